import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.core.units import Pattern
from sparse_lm.model import slots
from sparse_lm.patterns import pattern
from sparse_lm.weights.method import Sparse
from sparse_lm.weights.rewire import drop_and_grow

UNSTRUCTURED = Pattern()


def rewired(mask, weights, growth, fraction, noise, units=UNSTRUCTURED):
  """`drop_and_grow` of one matrix."""
  named = ({'w': array} for array in (mask, weights, growth, fraction, noise))
  new, survived = drop_and_grow(*named, units)
  return new['w'], survived['w']


JITTED = jax.jit(rewired, static_argnums=5)
RIGL, SET = slots.method('weight', 'rigl'), slots.method('weight', 'set')
FRACTIONS = [0.0, 0.125, 0.25, 0.5, 1.0]  # exact in float32, so that the floor is unambiguous


def largest(mask, weights, fraction):
  """The connections that are not dropped."""
  active = int(mask.sum())
  alive = np.flatnonzero(mask)
  by_magnitude = alive[np.argsort(-np.abs(weights.ravel()[alive]), kind='stable')]
  kept = np.zeros(mask.size, bool)
  kept[by_magnitude[: active - math.floor(fraction * active)]] = True
  return kept.reshape(mask.shape)


def oracle(mask, weights, growth, fraction):
  """One matrix, by sorting. Weights are apart by more than the 1e-5 of noise."""
  new = largest(mask, weights, fraction).ravel()
  drops = int(mask.sum()) - int(new.sum())
  free = np.flatnonzero(~new)
  new[free[np.argsort(-growth.ravel()[free], kind='stable')][:drops]] = True
  return new.reshape(mask.shape)


def random_case(seed, shape, density):
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < density
  spread = rng.permutation(math.prod(shape)).reshape(shape) + 1.0
  weights = (spread * 0.01 * rng.choice([-1, 1], shape) * mask).astype(np.float32)
  growth = np.abs(rng.standard_normal(shape)).astype(np.float32)
  return mask, weights, growth, rng.random(shape).astype(np.float32)


@given(
  st.integers(0, 2**31),
  st.sampled_from([(6, 9), (20, 3), (12,)]),
  st.sampled_from([0.05, 0.3, 0.7, 1.0]),
  st.sampled_from(FRACTIONS),
)
@settings(deadline=None, max_examples=80)
def test_equals_sorting(seed, shape, density, fraction):
  mask, weights, growth, noise = random_case(seed, shape, density)
  new, survived = map(np.asarray, JITTED(mask, weights, growth, np.float32(fraction), noise))
  np.testing.assert_array_equal(new, oracle(mask, weights, growth, fraction))
  np.testing.assert_array_equal(survived, largest(mask, weights, fraction))
  assert new.sum() == mask.sum()
  assert (new & ~mask).sum() <= fraction * mask.sum()


@pytest.mark.parametrize('fraction', FRACTIONS)
def test_every_expert_rewires_alone_and_keeps_its_own_count(fraction):
  mask, weights, growth, noise = random_case(3, (4, 6, 9), 0.3)
  mask[1] = False  # even one without connections
  weights = weights * mask
  new = np.asarray(JITTED(mask, weights, growth, np.float32(fraction), noise)[0])
  for slice_new, *rest in zip(new, mask, weights, growth):
    np.testing.assert_array_equal(slice_new, oracle(*rest, fraction))


def test_a_dropped_connection_may_be_grown_again():
  mask = np.array([[True, True, False, False]])
  weights = np.array([[5.0, 0.1, 0.0, 0.0]], np.float32)
  growth = np.array([[0.0, 9.0, 1.0, 2.0]], np.float32)
  noise = np.zeros((1, 4), np.float32)
  assert rewired(mask, weights, growth, 0.5, noise)[0].tolist() == mask.tolist()


def test_growth_never_selects_kept_weights_even_if_all_gradients_are_zero():
  mask, weights, _, noise = random_case(0, (6, 9), 0.5)
  new = np.asarray(JITTED(mask, weights, np.zeros((6, 9), np.float32), np.float32(0.5), noise)[0])
  assert new.sum() == mask.sum()


def test_noise_breaks_ties_of_the_drop():
  mask = np.array([[True, True, True, True, False, False]])
  noise = np.array([[0.1, 0.9, 0.5, 0.7, 0.0, 0.0]], np.float32)
  growth = np.array([[0, 0, 0, 0, 1, 1]], np.float32)
  new, _ = rewired(mask, mask.astype(np.float32), growth, 0.5, noise)
  assert new.tolist() == [[False, True, False, True, True, True]]


def in_groups(choose):
  """`choose(group of four inputs of an output, ...)` over 2-D arrays."""
  return lambda *arrays: np.concatenate(
    [
      np.stack([choose(*columns) for columns in zip(*(a[i : i + 4].T for a in arrays))], axis=1)
      for i in range(0, len(arrays[0]), 4)
    ]
  )


def test_n_of_m_masks_grow_in_groups_that_have_lost_a_weight():
  draw = np.random.default_rng(5)
  weights = (draw.permutation(96).reshape(12, 8) + 1).astype(np.float32)
  mask = in_groups(lambda w: np.argsort(np.argsort(-w)) < 2)(weights)
  growth, noise = draw.random((2, 12, 8)).astype(np.float32)
  weights *= mask
  new = np.asarray(rewired(mask, weights, growth, 0.25, noise, pattern('2:4'))[0])
  smallest = np.sort(weights[mask])[12]  # a quarter of 48 is dropped
  keep = mask & (weights >= smallest)
  want = in_groups(lambda k, g: np.argsort(np.argsort(-np.where(k, 9, g))) < 2)(keep, growth)
  np.testing.assert_array_equal(new, want)
  assert (new != mask).any() and not (keep & ~new).any()


@pytest.mark.parametrize('cls', [RIGL, SET])
def test_neurons_rewire_as_a_whole_by_the_means_over_their_weights(cls):
  group = Group('neuron', 'mlp', 12, (Member('up', -1), Member('down', -2)))
  draw = np.random.default_rng(6)
  alive = np.arange(12) % 2 == 0
  shapes = {'up': (5, 12), 'down': (12, 7)}
  weights, grads = ({p: draw.normal(size=s).astype('f') for p, s in shapes.items()} for _ in 'ab')

  def spread(units):
    return {'up': np.tile(units, (5, 1)), 'down': np.tile(units[:, None], (1, 7))}

  def means(leaves):
    both = np.concatenate([leaves['up'], leaves['down'].T])
    return np.abs(both).mean(axis=0)

  masks = spread(alive)
  params = {path: jnp.asarray(w * masks[path]) for path, w in weights.items()}
  sparse = Sparse(jax.tree.map(jnp.asarray, masks), dict.fromkeys(masks, jnp.float32(0.5)))
  method = cls(total_steps=10**6, pattern='neuron', drop_fraction=0.5, groups=(group,))
  change = method.update(
    {'params': params, 'learned': {}}, sparse, {'grads': grads}, jnp.int32(0), jax.random.key(0)
  )
  new = jax.tree.map(np.asarray, change.sparse.masks)
  units = new['up'][0]
  strongest = np.argsort(-np.where(alive, means(params), -1))[:3]
  survived = spread(np.isin(np.arange(12), strongest)) if cls is SET else masks
  for path, mask in spread(units).items():
    np.testing.assert_array_equal(new[path], mask)
    np.testing.assert_array_equal(
      change.trainable['params'][path], params[path] * (mask & survived[path])
    )
  assert units.sum() == 6 and units[strongest].all()
  if cls is RIGL:
    free = np.setdiff1d(np.arange(12), strongest)
    grown = free[np.argsort(-means(grads)[free])[:3]]
    assert set(np.flatnonzero(units)) == {*strongest, *grown}


@pytest.mark.parametrize('cls', [RIGL, SET])
def test_units_that_span_several_matrices_are_refused(cls):
  # Of `down(relu2(up(x)))` the gradient of a neuron whose weights are all zero is zero.
  draw = np.random.default_rng(0)
  up, down = draw.normal(size=(5, 3)), draw.normal(size=(3, 4))
  up[:, 1], down[1] = 0, 0
  loss = lambda up, down: jnp.sum(jax.nn.relu(x @ up) ** 2 @ down)  # noqa: E731
  x = draw.normal(size=(7, 5))
  for_up, for_down = jax.grad(loss, (0, 1))(up, down)
  assert not for_up[:, 1].any() and not for_down[1].any() and for_up[:, 0].any()
  group = Group('neuron', 'mlp', 3, (Member('up', -1), Member('down', -2)))
  with pytest.raises(UserError, match=r"config\.weight\.pattern='neuron' is not valid") as refused:
    cls(total_steps=10, pattern='neuron', groups=(group,)).check()
  assert '\n' not in str(refused.value)
  for name in ('unstructured', 'block:4', 'row', 'column', 'per_output', '2:4', 'global'):
    cls(total_steps=10, pattern=name, groups=(group,)).check()


def one_leaf(mask, weights):
  masks, target = {'w': jnp.asarray(mask), 'b': None}, {'w': jnp.float32(0.5), 'b': None}
  params = {'w': jnp.asarray(weights), 'b': jnp.ones(3)}
  return {'params': params, 'learned': {}}, Sparse(masks, target)


def test_rigl_grows_where_the_gradient_of_a_linear_layer_is_largest():
  rng = np.random.default_rng(0)
  x, goal = rng.standard_normal((32, 10)), rng.standard_normal((32, 8))
  mask, weights, _, _ = random_case(1, (10, 8), 0.4)
  # Loss 1/2 |X W - goal|^2: the gradient of W, live or not, is X^T (X W - goal).
  gradient = x.T @ (x @ weights - goal)
  trainable, sparse = one_leaf(mask, weights)
  method = RIGL(total_steps=1000, drop_fraction=0.5, end=0.75)
  signals = {'grads': {'w': jnp.asarray(gradient, jnp.float32), 'b': jnp.ones(3)}}
  change = method.update(trainable, sparse, signals, jnp.int32(250), jax.random.key(0))
  new = np.asarray(change.sparse.masks['w'])
  fraction = 0.5 / 2 * (1 + math.cos(math.pi * 250 / 750))  # equation 1 of RigL
  np.testing.assert_array_equal(new, oracle(mask, weights, np.abs(gradient), fraction))

  params = change.trainable['params']
  np.testing.assert_array_equal(params['w'], weights * new)  # born ones start at zero
  np.testing.assert_array_equal(change.toggled['w'], mask != new)
  assert change.toggled['b'] is None and change.sparse.masks['b'] is None
  np.testing.assert_array_equal(params['b'], np.ones(3))


def test_set_grows_at_random():
  mask, weights, _, _ = random_case(2, (40, 50), 0.3)
  trainable, sparse = one_leaf(mask, weights)
  method = SET(total_steps=100, drop_fraction=0.5)
  drops = math.floor(0.5 * mask.sum())
  update = jax.jit(lambda seed: method.update(trainable, sparse, {}, 10, jax.random.key(seed)))
  kept = np.abs(weights) >= np.sort(np.abs(weights[mask]))[drops]
  grown = np.zeros((40, 50))
  for seed in range(60):
    new = np.asarray(update(seed).sparse.masks['w'])
    assert new.sum() == mask.sum()
    assert not (kept & ~new).any()  # what is not dropped stays
    grown += new & ~mask
  # Positions that were never active are grown equally often: a binomial, whose variance is known.
  free = ~mask
  share = drops / (mask.size - mask.sum() + drops)
  counts = grown[free]
  assert counts.mean() == pytest.approx(60 * share, rel=0.02)
  assert counts.var() == pytest.approx(60 * share * (1 - share), rel=0.15)


@pytest.mark.parametrize('cls', [RIGL, SET])
def test_weights_that_are_dropped_and_grown_start_at_zero_in_set_and_keep_their_value_in_rigl(cls):
  mask, weights, _, _ = random_case(7, (20, 30), 0.7)
  trainable, sparse = one_leaf(mask, weights)
  # For RigL: gradients that are largest where the weights are smallest.
  signals = {'grads': {'w': jnp.asarray(1 / (1 + np.abs(weights))), 'b': jnp.ones(3)}}
  method = cls(total_steps=1000, drop_fraction=0.5)
  change = method.update(trainable, sparse, signals, jnp.int32(0), jax.random.key(0))
  new = np.asarray(change.sparse.masks['w'])
  survived = largest(mask, weights, 0.5)
  regrown = new & mask & ~survived
  assert regrown.sum() > 20 and (weights[regrown] != 0).all()
  carried = survived if cls is SET else new & mask
  np.testing.assert_array_equal(change.trainable['params']['w'], np.where(carried, weights, 0))
  # Moments of all that was dropped or set to zero are zeroed, and of nothing else.
  np.testing.assert_array_equal(change.toggled['w'], (mask | new) & ~carried)
  assert change.toggled['w'][regrown].all() == (cls is SET)


def test_set_drops_the_same_share_at_every_step():
  method = SET(total_steps=100, drop_fraction=0.25)
  assert [float(method.fraction(jnp.int32(s))) for s in (0, 10, 74)] == [0.25] * 3


@pytest.mark.parametrize('step', [0, 100, 375, 700, 750])
def test_rigl_drop_fraction_is_half_a_cosine_to_its_end(step):
  method = RIGL(total_steps=1000, drop_fraction=0.3, end=0.75)
  expected = 0.15 * (1 + math.cos(math.pi * step / 750))
  assert float(method.fraction(jnp.int32(step))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('cls', [RIGL, SET])
def test_updates_are_due_every_period_but_not_at_the_start_nor_from_the_end_on(cls):
  method = cls(total_steps=100, period=10, end=0.75)
  assert [s for s in range(110) if method.due(s)] == [10, 20, 30, 40, 50, 60, 70]
  assert [s for s in range(110) if dataclasses.replace(method, end=0.7).due(s)][-1] == 60


def test_two_leaves_of_one_shape_rewire_differently():
  mask, weights, _, _ = random_case(4, (20, 20), 0.3)
  params = {name: jnp.asarray(weights) for name in ('a', 'b')}
  sparse = Sparse(dict.fromkeys(params, jnp.asarray(mask)), dict.fromkeys(params, jnp.float32(0.3)))
  trainable = {'params': params, 'learned': {}}
  change = SET(total_steps=100).update(trainable, sparse, {}, jnp.int32(10), jax.random.key(0))
  assert (change.sparse.masks['a'] != change.sparse.masks['b']).any()
