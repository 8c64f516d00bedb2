import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.model import slots

MAGNITUDE = slots.method('weight', 'magnitude')
SIZE = 40 * 30


def due_steps(first, last, period):
  return sorted({*range(first, last + 1, period), last})


def ramp_density(step, first, last, final):
  """Zhu & Gupta, equation 1, in float64."""
  progress = min(max((step - first) / max(last - first, 1), 0), 1)
  return 1 - (1 - final) * (1 - (1 - progress) ** 3)


def largest(weights, alive, count):
  """The `count` largest magnitudes among the living, by a stable sort."""
  order = np.argsort(-np.where(alive, np.abs(weights), -1).ravel(), kind='stable')
  mask = np.zeros(weights.size, bool)
  mask[order[:count]] = True
  return mask.reshape(weights.shape)


class Run:
  """Weights that drift at random, and the method's updates between."""

  def __init__(self, method, final, seed=0):
    self.method = method
    self.rng = np.random.default_rng(seed)
    w = self.rng.standard_normal((40, 30)).astype(np.float32)
    w[0] = 0.0  # living weights may be exact zeros
    params = {'w': jnp.asarray(w), 'b': jnp.ones(4)}
    self.trainable, self.sparse = method.init(
      jax.random.key(0), params, {'w': jnp.float32(final), 'b': None}
    )
    self.update = jax.jit(
      lambda trainable, sparse, step: method.update(trainable, sparse, {}, step, jax.random.key(0))
    )

  @property
  def mask(self):
    return np.asarray(self.sparse.masks['w'])

  def step(self, step):
    """One training step; the change of connections where one is due, else None."""
    drift = jnp.asarray(self.rng.standard_normal((40, 30)) * 0.3, jnp.float32)
    params = self.trainable['params'] | {'w': self.trainable['params']['w'] + drift}
    self.trainable = self.method.constrain(self.trainable | {'params': params}, self.sparse)
    if not self.method.due(step):
      return None
    change = self.update(self.trainable, self.sparse, jnp.int32(step))
    self.trainable, self.sparse = change.trainable, change.sparse
    return change


def test_masks_follow_argsort_along_the_cubic_ramp():
  run = Run(MAGNITUDE(total_steps=80, start=0.25, end=0.75, period=6), final=0.13)
  seen = []
  for step in range(80):
    old, change = run.mask, run.step(step)
    if change is None:
      np.testing.assert_array_equal(run.mask, old)
      continue
    seen.append(step)
    count = max(1, round(SIZE * ramp_density(step, 20, 60, 0.13)))
    assert old.sum() >= run.mask.sum() == count
    assert not (run.mask & ~old).any()  # what is dropped does not return
    np.testing.assert_array_equal(change.toggled['w'], old != run.mask)
    w = np.asarray(run.trainable['params']['w'])
    assert not w[~run.mask].any()
  assert seen == due_steps(20, 60, 6)
  assert run.mask.sum() == round(SIZE * 0.13)


@pytest.mark.parametrize('pattern', ['unstructured', 'per_output', '2:4', 'block:10', 'row'])
@pytest.mark.parametrize('stopped', [12, 30])
def test_a_stretched_ramp_never_lets_a_mask_grow(stopped, pattern):
  fields = {'period': 3, 'pattern': pattern}
  run = Run(MAGNITUDE(total_steps=30, **fields), final=0.5 if pattern == '2:4' else 0.1)
  for step in range(stopped):
    run.step(step)
  at_stop = run.mask
  longer = Run(MAGNITUDE(total_steps=60, **fields), final=0.5 if pattern == '2:4' else 0.1)
  longer.trainable, longer.sparse = run.trainable, run.sparse
  for step in range(stopped, 60):
    old = longer.mask
    longer.step(step)
    assert not (longer.mask & ~old).any()
  if stopped == 30:  # the final density was reached before
    np.testing.assert_array_equal(longer.mask, at_stop)
  whole = Run(MAGNITUDE(total_steps=60, **fields), final=0.5 if pattern == '2:4' else 0.1)
  for step in range(60):
    whole.step(step)
  assert longer.mask.sum() == whole.mask.sum()


def test_an_update_keeps_the_largest_magnitudes_of_the_kept_weights():
  method = MAGNITUDE(total_steps=4, start=0.0, end=0.5, period=1)
  run = Run(method, final=0.25)
  for step in range(3):
    before, old = np.asarray(run.trainable['params']['w']), run.mask
    change = run.update(run.trainable, run.sparse, jnp.int32(step))
    expected = largest(before, old, round(SIZE * ramp_density(step, 0, 2, 0.25)))
    np.testing.assert_array_equal(change.sparse.masks['w'], expected)
    np.testing.assert_array_equal(change.trainable['params']['w'], before * expected)
    run.trainable, run.sparse = change.trainable, change.sparse


def test_kept_zeros_rank_before_dropped_weights():
  # Row 0 is dropped, row 2 is alive and zero: a plain sort of magnitudes would pick row 0 first.
  method = MAGNITUDE(total_steps=10, start=0.0, end=1.0, period=1)
  w = jnp.array([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
  trainable, sparse = method.init(jax.random.key(0), {'w': w}, {'w': jnp.float32(0.5)})
  mask = jnp.array([[False] * 2, [True] * 2, [True] * 2, [True] * 2])
  sparse = sparse.replace(masks={'w': mask}, target={'w': jnp.float32(0.625)})
  change = method.update(trainable, sparse, {}, jnp.int32(10), jax.random.key(0))
  assert change.sparse.masks['w'].tolist() == [[False] * 2, [True] * 2, [True, False], [True] * 2]


def test_training_starts_dense_and_leaves_without_target_stay_so():
  run = Run(MAGNITUDE(total_steps=10), final=0.1)
  assert run.mask.all() and run.sparse.masks['b'] is None
  params, density = run.method.effective(run.trainable, run.sparse, 'train', 0, None)
  np.testing.assert_array_equal(params['w'], run.trainable['params']['w'])
  assert density == {'w': 1.0, 'b': None}


@given(
  st.integers(10, 60), st.floats(0, 1), st.floats(0, 1), st.integers(1, 25), st.floats(0.05, 0.95)
)
@settings(deadline=None, max_examples=40)
def test_density_is_that_of_the_masks_at_the_start_of_each_step(total, a, b, period, final):
  method = MAGNITUDE(total_steps=total, start=min(a, b), end=max(a, b), period=period)
  first, last = (min(round(share * total), total - 1) for share in (min(a, b), max(a, b)))
  assume(first < last)  # pruning in one step has a test of its own
  held = 1.0
  for step in range(total):
    assert method.density(final, step) == pytest.approx(held, abs=1e-5)
    if step in due_steps(first, last, period):
      held = ramp_density(step, first, last, final)


def test_density_equals_the_masks_of_a_simulated_run():
  run = Run(MAGNITUDE(total_steps=40, start=0.2, end=0.9, period=5), final=0.2)
  for step in range(40):
    held = run.mask.mean()
    assert run.method.density(0.2, step) == pytest.approx(held, abs=0.51 / SIZE)
    run.step(step)


def test_pruning_in_one_step_reaches_the_target():
  run = Run(MAGNITUDE(total_steps=10, start=0.5, end=0.5, period=100), final=0.3)
  for step in range(10):
    run.step(step)
  assert run.mask.sum() == round(SIZE * 0.3)


@pytest.mark.parametrize('end', [0.75, 0.98, 1.0])
def test_the_target_is_reached_within_the_run(end):
  run = Run(MAGNITUDE(total_steps=20, start=0.25, end=end, period=4), final=0.3)
  for step in range(20):
    run.step(step)
  assert run.method.traits.exact_density and run.mask.sum() == round(SIZE * 0.3)


def test_a_bad_pattern_or_schedule_is_refused():
  with pytest.raises(UserError, match=r'config\.weight\.end=0\.5.*config\.weight\.start=0\.8'):
    MAGNITUDE(total_steps=10, start=0.8, end=0.5).check()
  with pytest.raises(UserError, match=r"config\.weight\.pattern 'unstructurd'"):
    _ = MAGNITUDE(total_steps=10, pattern='unstructurd').units
