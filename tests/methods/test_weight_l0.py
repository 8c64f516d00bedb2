"""Learned masks against the hard concrete distribution in NumPy (METHODS.md 2.14)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit

from sparse_lm.core import slots
from sparse_lm.core.groups import Group, Member
from sparse_lm.core.sparse import mean_density

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
  assert_allclose([density['up'], density['down']], open_, rtol=1e-5)
  assert density['bias'] is None and jax.tree.leaves(sparse.masks) == []


@pytest.mark.parametrize(('log_alpha', 'p'), [(-2, 0.401), (0, 0.832), (2, 0.973)])
def test_density_is_the_chance_that_a_gate_is_open(log_alpha, p):
  method, trainable, sparse = started()
  trainable = with_logits(trainable, lambda shape: np.full(shape, log_alpha))
  for mode, key in (('train', KEY), ('train', None), ('eval', None)):
    _, density = method.effective(trainable, sparse, mode, 0, key)
    assert_allclose([density['up'], density['down']], p, atol=5e-4)


def test_density_is_of_each_leaf_over_the_weights_of_its_units():
  method, trainable, sparse = started('neuron')
  logits = np.linspace(-4, 4, 12)
  trainable = with_logits(trainable, lambda shape: logits)
  _, density = method.effective(trainable, sparse, 'train', 0, None)
  assert_allclose([density['up'], density['down']], probability(logits).mean(), rtol=1e-5)
  method, trainable, sparse = started('layer')
  trainable = with_logits(trainable, lambda shape: np.array([-3.0, 1.0]))
  _, density = method.effective(trainable, sparse, 'train', 0, None)
  assert_allclose([density['up'], density['down']], probability([-3.0, 1.0]), rtol=1e-5)


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


def parts(pattern, array):
  """What is ranked together, in rows: some patterns say how many of each part are kept."""
  size = {'per_output': array.shape[0], '2:4': 4}.get(pattern, array.size)
  return array.T.reshape(-1, size) if pattern in ('per_output', '2:4') else array.reshape(1, -1)


def clear_logits(pattern, shift):
  """Random ones whose expected number of open units is no near tie between two whole numbers."""
  for seed in range(50):
    draw = np.random.default_rng(seed)
    learned = {name: draw.normal(shift, 2, s).astype('f') for name, s in BY_LEAF[pattern].items()}
    sizes = {name: parts(pattern, logits).shape[1] for name, logits in learned.items()}
    expected = {name: sizes[name] * probability(learned[name]).mean() for name in learned}
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
    rank = np.argsort(np.argsort(-parts(pattern, logits), axis=1), axis=1)
    opened = rank < counts[name]
    by_column = pattern in ('per_output', '2:4')
    opened = opened.reshape(logits.T.shape).T if by_column else opened.reshape(logits.shape)
    gates[name] = np.where(opened, evaluated(logits), 0)
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
  ('unstructured', 256), ('block:4', 16), ('row', 16), ('column', 16), ('per_output', 16),
  ('2:4', 4),
])  # fmt: skip
def test_every_expert_opens_its_own_expected_number(pattern, units):
  method, trainable, sparse = started(pattern, {'w': (3, 16, 16)})
  # Of every 4, 16 or 256 units that are ranked together.
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


def test_gradients_reach_logits_through_gates_and_through_the_price():
  method, trainable, sparse = started('block:4', price=0.7)
  draw = np.random.default_rng(5)
  trainable = with_logits(trainable, lambda shape: draw.normal(0, 1, shape))
  toward = {path: draw.normal(size=shape).astype('f') for path, shape in SHAPES.items()}

  def total(learned, gates, price):
    seen, density = method.effective(trainable | {'learned': learned}, sparse, 'train', 0, KEY)
    worth = sum(jnp.sum(toward[path] * seen[path]) for path in SHAPES)
    return gates * worth + price * method.penalty(mean_density(density, seen))

  run, slope = jax.jit(total), jax.jit(jax.grad(total))
  learned, step, moved = trainable['learned'], 1e-2, 0
  for gates, price in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
    got = slope(learned, gates, price)
    for name, logits in learned.items():
      for index in np.ndindex(logits.shape):
        ahead, behind = (
          float(run(learned | {name: logits.at[index].add(sign * step)}, gates, price))
          for sign in (1, -1)
        )
        want = (ahead - behind) / (2 * step)
        assert float(got[name][index]) == pytest.approx(want, rel=2e-2, abs=2e-3)
        moved += abs(want) > 1e-2
  assert moved > 12


def test_the_price_is_for_the_mean_over_all_prunable_weights():
  method, trainable, sparse = started('row', price=0.7)
  draw = np.random.default_rng(5)
  trainable = with_logits(trainable, lambda shape: draw.normal(0, 1, shape))

  def penalty(learned):
    seen, density = method.effective(trainable | {'learned': learned}, sparse, 'train', 0, KEY)
    return method.penalty(mean_density(density, seen))

  value, got = jax.value_and_grad(penalty)(trainable['learned'])
  p = {name: probability(logits) for name, logits in trainable['learned'].items()}
  share = {'up': 12 / 192, 'down': 8 / 192}  # of a row's weights
  assert float(value) == pytest.approx(0.7 * sum((p[n] * share[n]).sum() for n in p), rel=1e-5)
  for name, chance in p.items():
    assert_allclose(got[name], 0.7 * share[name] * chance * (1 - chance), rtol=1e-4)
