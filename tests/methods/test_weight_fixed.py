import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model import slots
from sparse_lm.weights.method import mean_density

TARGET = {'w': jnp.float32(0.25), 'b': None}


def started(name):
  method = slots.method('weight', name)(total_steps=100)
  params = {'w': jax.random.normal(jax.random.key(0), (16, 20)), 'b': jnp.ones(3)}
  # `none` hands the parameters through, which a test asserts by identity.
  init = method.init if name == 'none' else jax.jit(method.init)
  return method, params, *init(jax.random.key(1), params, TARGET)


@pytest.mark.parametrize('name', ['static', 'set', 'rigl'])
def test_random_starts_hold_their_density_from_step_0(name):
  method, _, trainable, sparse = started(name)
  assert sparse.masks['w'].sum() == 80 and sparse.masks['b'] is None
  assert not trainable['params']['w'][~sparse.masks['w']].any()
  assert {method.density(0.25, step) for step in (0, 50, 99)} == {0.25}
  params, density = method.effective(trainable, sparse, 'train', 0, None)
  np.testing.assert_array_equal(params['w'], trainable['params']['w'])
  assert density == {'w': 0.25, 'b': None}


@pytest.mark.parametrize('name', ['static', 'set', 'rigl'])
def test_the_optimizer_changes_no_dropped_weight(name):
  method, _, trainable, sparse = started(name)
  moved = {'params': jax.tree.map(lambda w: w + 1, trainable['params']), 'learned': {}}
  params = method.constrain(moved, sparse)['params']
  np.testing.assert_array_equal(params['w'], moved['params']['w'] * sparse.masks['w'])
  np.testing.assert_array_equal(params['b'], [2, 2, 2])


@pytest.mark.parametrize('name', ['static', 'set', 'rigl', 'magnitude'])
def test_the_gradient_is_masked(name):
  method, _, trainable, sparse = started(name)
  mask = jnp.ones((16, 20), bool).at[:, ::2].set(False)
  sparse = sparse.replace(masks={'w': mask, 'b': None})
  trainable = trainable | {'params': trainable['params'] | {'w': jnp.ones((16, 20))}}
  gradient = jax.grad(
    lambda t: jnp.sum(method.effective(t, sparse, 'train', 0, None)[0]['w'] * 3.0)
  )(trainable)
  np.testing.assert_array_equal(gradient['params']['w'], 3.0 * mask)


def test_static_masks_never_change():
  method = started('static')[0]
  assert not any(method.due(step) for step in range(200))


def test_the_dense_method_changes_nothing():
  method, params, trainable, sparse = started('none')
  assert trainable['params'] is params and jax.tree.leaves(sparse) == []
  seen, density = method.effective(trainable, sparse, 'train', 0, None)
  np.testing.assert_array_equal(seen['w'], params['w'])
  assert density == {'w': None, 'b': None} and not method.due(0)
  assert float(mean_density(density, params)) == 1.0
  final, masks = method.finalize(trainable, sparse, 0)
  np.testing.assert_array_equal(final['w'], params['w'])
  assert jax.tree.leaves(masks) == []


def test_only_rigl_asks_for_the_dense_gradient_and_only_when_it_rewires():
  rigl = slots.method('weight', 'rigl')(total_steps=1000, period=100)
  dense = [step for step in range(1000) if rigl.backward_density(0.1, step) is not None]
  assert dense == [100, 200, 300, 400, 500, 600, 700]
  assert {rigl.backward_density(0.1, step) for step in dense} == {1.0}
  assert rigl.traits.replaces_step and rigl.traits.needs == ('grads',)
  for name in ('static', 'set', 'magnitude', 'none'):
    method = slots.method('weight', name)(total_steps=1000)
    assert {method.backward_density(0.1, step) for step in range(1000)} == {None}


def test_mean_density_is_over_the_weights_of_the_leaves_that_have_one():
  params = {'a': jnp.ones((4, 5)), 'b': jnp.ones((2, 3, 10)), 'c': jnp.ones(1000)}
  density = {'a': jnp.float32(0.5), 'b': jnp.float32(0.1), 'c': None}
  assert float(mean_density(density, params)) == pytest.approx((10 + 6) / 80)
