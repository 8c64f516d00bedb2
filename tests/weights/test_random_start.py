import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.patterns import pattern
from sparse_lm.weights.random_start import check, path_key, path_keys, random_start, uniform

FAN_IN, FAN_OUT = 256, 200
UNSTRUCTURED = pattern('unstructured')


def start(rescale, density, params=None, seed=0, units=UNSTRUCTURED):
  if params is None:
    params = {'w': jax.random.normal(jax.random.key(7), (FAN_IN, FAN_OUT)) / FAN_IN**0.5}
  target = jax.tree.map(lambda _: jnp.float32(density), params)
  draw = jax.jit(random_start, static_argnums=(3, 4))
  trainable, sparse = draw(jax.random.key(seed), params, target, units, rescale)
  return params, trainable['params'], sparse.masks


@pytest.mark.parametrize('rescale', ['unit', 'layer'])
@pytest.mark.parametrize('density', [0.5, 0.1])
def test_pre_activation_variance_equals_the_dense_layers(rescale, density):
  _, sparse, _ = start(rescale, density)
  x = np.random.default_rng(0).standard_normal((500, FAN_IN))
  variance = np.mean((x @ np.asarray(sparse['w'], float)) ** 2)
  # N weights of variance 1/fan_in: the dense layer's is 1, and a mean over density * N squares of
  # normals has a relative standard error of sqrt(2 / (density N)); four of them pass.
  tolerance = 4 * (2 / (density * FAN_IN * FAN_OUT)) ** 0.5 + 4 * (2 / (500 * FAN_OUT)) ** 0.5
  assert variance == pytest.approx(1, abs=tolerance)


def test_without_rescaling_the_variance_falls_to_the_density():
  _, sparse, _ = start('none', 0.1)
  assert float(jnp.sum(sparse['w'] ** 2)) / FAN_OUT == pytest.approx(0.1, rel=0.1)


def test_unit_rescaling_gives_every_output_its_own_factor():
  dense, sparse, masks = start('unit', 0.1)
  mask, w = np.asarray(masks['w']), np.asarray(dense['w'])
  fan_in = mask.sum(axis=0)
  assert len(set(fan_in.tolist())) > 5
  np.testing.assert_allclose(sparse['w'], w * mask * np.sqrt(FAN_IN / fan_in), rtol=1e-5)


def test_layer_rescaling_gives_all_outputs_one_factor():
  dense, sparse, masks = start('layer', 0.25)
  np.testing.assert_allclose(sparse['w'], dense['w'] * masks['w'] * 2, rtol=1e-6)


def test_no_rescaling_keeps_the_values():
  dense, sparse, masks = start('none', 0.25)
  np.testing.assert_array_equal(sparse['w'], dense['w'] * masks['w'])


@pytest.mark.parametrize('density', [0.001, 0.1, 0.333, 1.0])
def test_counts_are_exact_in_every_matrix(density):
  params = {'w': jnp.ones((40, 50)), 'experts': jnp.ones((3, 20, 10))}
  _, _, masks = start('unit', density, params)
  assert masks['w'].sum() == max(1, round(2000 * density))
  assert masks['experts'].sum(axis=(1, 2)).tolist() == [max(1, round(200 * density))] * 3


def test_masks_are_random_over_rows_and_columns():
  mask = np.asarray(start('none', 0.3)[2]['w'])
  # Without replacement from the matrix: counts a column are hypergeometric, about binomial.
  for axis, size in ((0, FAN_IN), (1, FAN_OUT)):
    counts = mask.sum(axis=axis)
    assert counts.var() == pytest.approx(size * 0.3 * 0.7, rel=0.4)


def test_an_additional_leaf_changes_no_mask():
  first = {'b': {'w': jnp.ones((9, 9))}}
  more = {'a': {'w': jnp.ones((9, 9))}, 'b': {'w': jnp.ones((9, 9))}, 'c': jnp.ones((3, 4))}
  alone, joined = start('none', 0.4, first)[2], start('none', 0.4, more)[2]
  np.testing.assert_array_equal(alone['b']['w'], joined['b']['w'])
  # Leaves of one shape do not share a mask.
  assert (joined['a']['w'] != joined['b']['w']).any()


def test_masks_depend_only_on_the_key():
  same, other = start('unit', 0.4)[2], start('layer', 0.4, seed=1)[2]
  np.testing.assert_array_equal(same['w'], start('layer', 0.4)[2]['w'])
  assert (same['w'] != other['w']).any()


def test_dense_leaves_are_left_alone():
  params = {'w': jnp.ones((4, 4)), 'b': jnp.full(4, 2.0)}
  trainable, sparse = random_start(
    jax.random.key(0), params, {'w': jnp.float32(0.5), 'b': None}, UNSTRUCTURED, 'unit'
  )
  assert sparse.masks['b'] is None and trainable['params']['b'].tolist() == [2.0] * 4


@pytest.mark.parametrize('name', ['2:4', 'per_output'])
def test_a_constant_fan_in_is_rescaled_by_one_factor(name):
  dense, sparse, masks = start('unit', 0.5, units=pattern(name))
  assert set(masks['w'].sum(axis=0).tolist()) == {FAN_IN // 2}
  np.testing.assert_allclose(sparse['w'], dense['w'] * masks['w'] * 2**0.5, rtol=1e-6)


def test_an_output_without_weights_stays_finite_and_the_others_keep_their_fan_in():
  dense, sparse, masks = start('unit', 0.25, units=pattern('column'))
  assert sorted(set(masks['w'].sum(axis=0).tolist())) == [0, FAN_IN]
  np.testing.assert_array_equal(sparse['w'], dense['w'] * masks['w'])


def test_groups_are_drawn_once_for_all_their_matrices():
  members = (Member('down', -2), Member('up', -1))
  units = pattern('neuron', (Group('neuron', 'mlp', 60, members),))
  params = {'up': jnp.ones((9, 60)), 'down': jnp.ones((60, 9))}
  masks = start('none', 0.4, params, units=units)[2]
  alive = np.asarray(masks['up'])[0]
  assert alive.sum() == 24 and not alive[:24].all()
  np.testing.assert_array_equal(masks['up'], np.broadcast_to(alive, (9, 60)))
  np.testing.assert_array_equal(masks['down'], np.asarray(masks['up']).T)


def test_an_unknown_rescaling_is_refused():
  with pytest.raises(UserError, match=r"config\.weight\.rescale 'units'.*mean 'unit'"):
    check('units')


def test_draws_of_one_shape_together_are_those_of_each_path_alone():
  key, like = (
    jax.random.key(3),
    {'a': np.zeros((4, 6)), 'b': np.zeros((6, 4)), 'c': np.zeros((4, 6))},
  )
  found = jax.jit(lambda key: uniform(path_keys(key, like), like))(key)
  assert list(found) == list(like)
  for path, array in like.items():
    np.testing.assert_array_equal(found[path], jax.random.uniform(path_key(key, path), array.shape))
