"""Learned masks against the hard concrete distribution in NumPy (METHODS.md 2.14)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit

from sparse_lm.core.groups import Group, Member
from sparse_lm.model import slots

L0 = slots.method('weight', 'l0')
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
KEY = jax.random.key(2)
SHAPES = {'up': (8, 12), 'down': (12, 8), 'bias': (12,)}
MEMBERS = (Member('up', -1), Member('down', -2))
GROUPS = (
  Group('neuron', 'mlp', 12, MEMBERS),
  Group('head', 'mlp', 4, MEMBERS),
  Group('layer', '', 2, (Member('up', None, 0), Member('down', None, 1))),
)
# The shape of each array of logits.
BY_LEAF = {
  'unstructured': {'up': (8, 12), 'down': (12, 8)},
  'per_output': {'up': (8, 12), 'down': (12, 8)},
  '2:4': {'up': (8, 12), 'down': (12, 8)},
  'block:4': {'up': (2, 3), 'down': (3, 2)},
  'row': {'up': (8, 1), 'down': (12, 1)},
  'column': {'up': (1, 12), 'down': (1, 8)},
  'global': {'all': (192,)},
  'neuron': {'mlp/neuron': (12,)},
  'head': {'mlp/head': (4,)},
  'layer': {'layer': (2,)},
}


def probability(logits):
  """P(gate > 0), equation 12 of the paper."""
  return expit(np.float64(logits) - BETA * np.log(-GAMMA / ZETA))


def stretched(s):
  return np.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def evaluated(logits):
  """The value of an open gate in evaluation (METHODS.md 2.14)."""
  return expit(0.8 * np.float64(logits) / BETA)


def sampled(logits, uniform):
  """A gate at a uniform draw, equations 10 and 11."""
  return stretched(expit((np.log(uniform) - np.log1p(-uniform) + logits) / BETA))


def started(pattern='unstructured', shapes=SHAPES, **fields):
  """The method, its trainable tree and its state; all but `bias` is prunable."""
  method = L0(total_steps=10, pattern=pattern, groups=GROUPS, **fields)
  draw = np.random.default_rng(0)
  params = {path: draw.normal(size=shape).astype('f') for path, shape in shapes.items()}
  target = {path: None if path == 'bias' else jnp.float32(1) for path in shapes}
  return method, *method.init(jax.random.key(0), params, target)


def with_logits(trainable, draw):
  """The same with logits of `draw(shape)`."""
  learned = {name: jnp.float32(draw(array.shape)) for name, array in trainable['learned'].items()}
  return trainable | {'learned': learned}


@functools.cache
def effective(method, mode):
  return jax.jit(lambda trainable, sparse, key: method.effective(trainable, sparse, mode, 0, key))


@functools.cache
def finalize(method):
  return jax.jit(lambda trainable, sparse: method.finalize(trainable, sparse, jnp.int32(9)))


@pytest.mark.parametrize('pattern', BY_LEAF)
@pytest.mark.parametrize('open_', [0.9, 0.3])
def test_every_unit_starts_open_with_the_probability_of_the_config(pattern, open_):
  method, trainable, sparse = started(pattern, open=open_)
  found = {name: logits.shape for name, logits in trainable['learned'].items()}
  assert found == BY_LEAF[pattern]
  for logits in trainable['learned'].values():
    assert logits.dtype == jnp.float32 and not logits.weak_type
    assert_allclose(probability(logits), open_, rtol=1e-5)
  _, density = effective(method, 'train')(trainable, sparse, KEY)
  assert density['bias'] is None and jax.tree.leaves(sparse.masks) == []


@pytest.mark.parametrize('pattern', BY_LEAF)
@given(st.integers(0, 2**31), st.floats(-6, 6), st.floats(0, 4))
@settings(deadline=None, max_examples=25)
def test_training_pays_for_the_share_that_evaluation_opens(pattern, seed, shift, spread):
  method, trainable, sparse = started(pattern)
  draw = np.random.default_rng(seed)
  trainable = with_logits(trainable, lambda shape: draw.normal(shift, spread, shape))
  _, masks = finalize(method)(trainable, sparse)
  for mode, key in (('train', KEY), ('train', None), ('eval', None)):
    _, density = effective(method, mode)(trainable, sparse, key)
    for path in ('up', 'down'):
      assert_allclose(density[path], np.mean(masks[path]), rtol=1e-6)
  # Which is what is expected to be open, to the half unit.
  opened = {
    name: np.asarray(units)
    for name, units in method.units.pool(
      {path: jnp.float32(masks[path]) for path in ('up', 'down')}
    ).items()
  }
  for name, logits in trainable['learned'].items():
    expected = probability(logits).sum()
    assert abs((opened[name] > 0).sum() - max(expected, 1)) <= 0.5 + 1e-3


@pytest.mark.parametrize('pattern', BY_LEAF)
def test_the_price_of_a_leaf_has_the_gradient_of_its_expected_density(pattern):
  method, trainable, sparse = started(pattern)
  trainable = with_logits(trainable, lambda shape: np.random.default_rng(3).normal(0, 2, shape))
  learned = trainable['learned']

  def priced(learned):
    return method.effective(trainable | {'learned': learned}, sparse, 'train', 0, None)[1]

  prunable = {path: trainable['params'][path] for path in ('up', 'down')}
  spread = jax.jit(lambda units: method.units.expand(units, prunable))
  slopes = jax.jit(jax.jacrev(priced))(learned)
  for path in prunable:
    got = slopes[path]
    for name, logits in learned.items():
      p = probability(logits)
      own = jax.tree.map(jnp.zeros_like, learned)
      # A unit's share of the leaf: what the mean moves where this unit alone is 1.
      for index in np.ndindex(p.shape):
        one = np.zeros(p.shape, np.float32)
        one[index] = 1
        share = float(np.mean(spread(own | {name: one})[path]))
        want = share * p[index] * (1 - p[index])
        assert float(got[name][index]) == pytest.approx(want, rel=1e-3, abs=1e-7)


DRAWS = (200, 250)


@pytest.mark.parametrize('log_alpha', [-2.0, 0.0, 2.0])
def test_training_draws_gates_of_the_hard_concrete_distribution(log_alpha):
  method, trainable, sparse = started(shapes={'w': DRAWS})
  trainable = {'params': {'w': jnp.ones(DRAWS)}, 'learned': trainable['learned']}
  trainable = with_logits(trainable, lambda shape: np.full(shape, log_alpha))
  seen, _ = effective(method, 'train')(trainable, sparse, KEY)
  gates = np.asarray(seen['w'], np.float64).ravel()
  want = sampled(log_alpha, (np.arange(2_000_000) + 0.5) / 2_000_000)
  for statistic in (lambda z: z, lambda z: z == 0, lambda z: z == 1, lambda z: z > 0.5):
    expected, spread = statistic(want).mean(), statistic(want).std()
    assert abs(statistic(gates).mean() - expected) < 5 * spread / gates.size**0.5
  assert abs(np.corrcoef(gates[:-1], gates[1:])[0, 1]) < 5 / gates.size**0.5


@pytest.mark.parametrize('pattern', BY_LEAF)
def test_a_unit_has_one_gate_and_every_unit_its_own(pattern):
  method, trainable, sparse = started(pattern, open=0.5)
  ones = jax.tree.map(jnp.ones_like, trainable['params'])
  seen, _ = effective(method, 'train')(trainable | {'params': ones}, sparse, KEY)
  values = method.units.pool({path: seen[path] for path in ('up', 'down')})
  if pattern == 'global':  # which divides by the norm
    values = {'all': np.concatenate([seen['down'].ravel(), seen['up'].ravel()])}
  spread = method.units.expand(values, {path: seen[path] for path in ('up', 'down')})
  gates = np.concatenate([np.ravel(v) for v in values.values()])
  inside = gates[(gates > 0) & (gates < 1)]
  assert len(np.unique(inside)) == len(inside)
  for path in ('up', 'down'):
    assert_allclose(seen[path], spread[path], atol=1e-6)
  again, _ = effective(method, 'train')(trainable | {'params': ones}, sparse, KEY)
  other, _ = effective(method, 'train')(trainable | {'params': ones}, sparse, jax.random.key(3))
  assert_array_equal(again['up'], seen['up'])
  assert any((other[path] != seen[path]).any() for path in ('up', 'down'))
  assert_array_equal(seen['bias'], np.ones(12))


def clear_logits(pattern, shift):
  """Random ones whose expected number of open units is no near tie between two whole numbers."""
  for seed in range(50):
    draw = np.random.default_rng(seed)
    learned = {name: draw.normal(shift, 2, s).astype('f') for name, s in BY_LEAF[pattern].items()}
    expected = {name: probability(logits).sum() for name, logits in learned.items()}
    if all(abs(number % 1 - 0.5) > 0.1 for number in expected.values()):
      return learned, {name: max(1, round(number)) for name, number in expected.items()}
  raise AssertionError('no draw is clear')


@pytest.mark.parametrize('pattern', BY_LEAF)
@pytest.mark.parametrize('shift', [-1.5, 0.5])
def test_evaluation_opens_the_expected_number_at_their_deterministic_values(pattern, shift):
  method, trainable, sparse = started(pattern)
  learned, counts = clear_logits(pattern, shift)
  trainable = trainable | {'learned': jax.tree.map(jnp.asarray, learned)}
  gates = {}
  for name, logits in learned.items():
    # Of a whole array: neither N:M nor per_output has a share for each of its parts.
    rank = np.argsort(np.argsort(-logits, axis=None)).reshape(logits.shape)
    gates[name] = np.where(rank < counts[name], evaluated(logits), 0)
  prunable = {path: trainable['params'][path] for path in ('up', 'down')}
  want = method.units.expand(jax.tree.map(jnp.float32, gates), prunable)
  final, masks = finalize(method)(trainable, sparse)
  seen, _ = effective(method, 'eval')(trainable, sparse, None)
  for path in ('up', 'down'):
    folded = prunable[path] * want[path]
    assert_allclose(final[path], folded, rtol=1e-5, atol=1e-6)
    assert_allclose(seen[path], folded, rtol=1e-5, atol=1e-6)
    assert not np.asarray(final[path])[~np.asarray(masks[path])].any()
    assert_array_equal(masks[path], want[path] > 0)
  assert masks['bias'] is None
  assert_array_equal(final['bias'], trainable['params']['bias'])
  assert_array_equal(seen['bias'], trainable['params']['bias'])


@pytest.mark.parametrize('pattern', BY_LEAF)
@pytest.mark.parametrize(('shift', 'spread'), [(-8, 0), (-4, 0), (-4, 2), (-30, 6), (0, 6), (8, 4)])
def test_a_unit_is_kept_exactly_where_its_gate_is_not_zero(pattern, shift, spread):
  method, trainable, sparse = started(pattern)
  draw = np.random.default_rng(4)
  trainable = with_logits(trainable, lambda shape: draw.normal(shift, spread, shape))
  ones = jax.tree.map(jnp.ones_like, trainable['params'])
  final, masks = finalize(method)(trainable | {'params': ones}, sparse)
  seen, _ = effective(method, 'eval')(trainable | {'params': ones}, sparse, None)
  assert any(np.asarray(masks[path]).any() for path in ('up', 'down'))
  for path in ('up', 'down'):
    assert_array_equal(final[path] > 0, masks[path])
    assert_array_equal(seen[path] > 0, masks[path])


@pytest.mark.parametrize(('pattern', 'units'), [
  ('unstructured', 256), ('block:4', 16), ('row', 16), ('column', 16), ('per_output', 256),
  ('2:4', 256),
])  # fmt: skip
def test_every_expert_opens_its_own_expected_number(pattern, units):
  method, trainable, sparse = started(pattern, {'w': (3, 16, 16)})
  # Of the 16 or 256 units of an expert.
  chances = (1.15 / 4, 2.2 / 4, 2.85 / 4)
  level = np.array([np.log(p / (1 - p)) + BETA * np.log(-GAMMA / ZETA) for p in chances])
  noise = np.random.default_rng(6).normal(0, 1e-3, trainable['learned']['w'].shape)
  logits = np.float32(level[:, None, None] + noise)
  trainable = trainable | {'learned': {'w': jnp.asarray(logits)}}
  counts = [round(units * probability(one).mean()) for one in logits]
  assert len(set(counts)) == 3 and min(counts) > 0 and max(counts) < units
  final, masks = finalize(method)(trainable, sparse)
  seen, _ = effective(method, 'eval')(trainable, sparse, None)
  assert [float(mask.mean()) for mask in np.asarray(masks['w'])] == [n / units for n in counts]
  assert_array_equal(final['w'] != 0, masks['w'])
  assert_array_equal(seen['w'] != 0, masks['w'])


def test_training_without_a_key_is_as_deterministic_as_evaluation():
  method, trainable, sparse = started()
  trainable = with_logits(trainable, lambda shape: np.random.default_rng(8).normal(0, 2, shape))
  training, evaluation = (
    effective(method, mode)(trainable, sparse, None) for mode in ('train', 'eval')
  )
  jax.tree.map(assert_array_equal, training, evaluation)


def test_final_masks_count_the_expected_number_of_units():
  method, trainable, sparse = started('neuron')
  logits = np.random.default_rng(7).normal(0, 2, 12)
  trainable = with_logits(trainable, lambda shape: logits)
  _, masks = method.finalize(trainable, sparse, jnp.int32(9))
  count = round(probability(logits).sum())
  assert 1 < count < 12
  assert_array_equal(masks['up'][0], np.argsort(np.argsort(-logits)) < count)


def test_gradients_reach_logits_through_gates():
  method, trainable, sparse = started('block:4')
  draw = np.random.default_rng(5)
  trainable = with_logits(trainable, lambda shape: draw.normal(0, 1, shape))
  toward = {path: draw.normal(size=shape).astype('f') for path, shape in SHAPES.items()}

  def worth(learned):
    seen, _ = method.effective(trainable | {'learned': learned}, sparse, 'train', 0, KEY)
    return sum(jnp.sum(toward[path] * seen[path]) for path in SHAPES)

  run, got = jax.jit(worth), jax.jit(jax.grad(worth))(trainable['learned'])
  learned, step, moved = trainable['learned'], 1e-2, 0
  for name, logits in learned.items():
    for index in np.ndindex(logits.shape):
      ahead, behind = (
        float(run(learned | {name: logits.at[index].add(sign * step)})) for sign in (1, -1)
      )
      want = (ahead - behind) / (2 * step)
      assert float(got[name][index]) == pytest.approx(want, rel=2e-2, abs=2e-3)
      moved += abs(want) > 1e-2
  assert moved > 4


def test_the_price_is_for_the_mean_over_all_prunable_weights():
  method, trainable, sparse = started('row', price=0.7)
  draw = np.random.default_rng(5)
  trainable = with_logits(trainable, lambda shape: draw.normal(0, 1, shape))

  def penalty(learned):
    now = trainable | {'learned': learned}
    _, density = method.effective(now, sparse, 'train', 0, KEY)
    return method.penalty(now, sparse, density)

  value, got = jax.value_and_grad(penalty)(trainable['learned'])
  p = {name: probability(logits) for name, logits in trainable['learned'].items()}
  share = {'up': 12 / 192, 'down': 8 / 192}  # of a row's weights
  opened = {name: round(p[name].sum()) for name in p}  # what evaluation runs
  assert float(value) == pytest.approx(0.7 * sum(opened[n] * share[n] for n in p), rel=1e-5)
  for name, chance in p.items():
    assert_allclose(got[name], 0.7 * share[name] * chance * (1 - chance), rtol=1e-4)
