import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core import slots
from sparse_lm.core.estimator import straight_through

STE = slots.method('weight', 'ste')


def loss_gradient(w, x, goal):
  """Gradient by hand of mean((tanh(x w) - goal)^2) at w, float64."""
  y = np.tanh(x @ w)
  return x.T @ (2 * (y - goal) * (1 - y**2)) / goal.size


def problem(seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((30, 6)), rng.standard_normal((6, 5)), rng.standard_normal((30, 5))


def test_gradient_is_that_at_the_masked_values_even_where_masked():
  x, w, goal = problem()
  mask = np.random.default_rng(1).random(w.shape) < 0.5

  def loss(w):
    return jnp.mean((jnp.tanh(x @ straight_through(w, mask)) - goal) ** 2)

  gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(w, jnp.float32)))
  np.testing.assert_allclose(gradient, loss_gradient(w * mask, x, goal), atol=1e-6)
  # A masked gradient, or one taken at the dense values, would differ.
  assert (np.abs(gradient[~mask]) > 1e-4).all()
  assert np.abs(gradient - loss_gradient(w, x, goal)).max() > 1e-2


def test_forward_is_the_masked_values():
  w = jnp.array([[1.0, -2.0], [3.0, jnp.inf]])
  seen = straight_through(w, jnp.array([[True, False], [True, False]]))
  assert seen.tolist() == [[1.0, 0.0], [3.0, 0.0]]


def test_ste_method_sees_the_largest_magnitudes_and_learns_all_weights():
  x, w, goal = problem(2)
  method = STE(total_steps=10)
  params = {'w': jnp.asarray(w, jnp.float32), 'b': jnp.zeros(5)}
  target = {'w': jnp.float32(0.4), 'b': None}
  trainable, sparse = method.init(jax.random.key(0), params, target)
  step = jnp.int32(5)
  keep = np.zeros(w.size, bool)
  keep[np.argsort(-np.abs(w).ravel(), kind='stable')[:12]] = True
  keep = keep.reshape(w.shape)

  def loss(trainable):
    seen, _ = method.effective(trainable, sparse, 'train', step, None)
    return jnp.mean((jnp.tanh(x @ seen['w'] + seen['b']) - goal) ** 2)

  gradient = jax.jit(jax.grad(loss))(trainable)['params']['w']
  np.testing.assert_allclose(gradient, loss_gradient(w * keep, x, goal), atol=1e-6)
  assert (np.abs(np.asarray(gradient)[~keep]) > 0).all()

  seen, cost = method.effective(trainable, sparse, 'train', step, None)
  np.testing.assert_array_equal(seen['w'], params['w'] * keep)
  assert float(cost) == np.float32(12 / 30)
  final, masks = method.finalize(trainable, sparse, step)
  np.testing.assert_array_equal(masks['w'], keep)
  np.testing.assert_array_equal(final['w'], params['w'] * keep)
  assert masks['b'] is None and final['b'].shape == (5,)


def test_ste_chooses_again_when_magnitudes_change():
  method = STE(total_steps=10)
  target = {'w': jnp.float32(0.5)}
  _, sparse = method.init(jax.random.key(0), {'w': jnp.ones((1, 2))}, target)
  for values, expected in (([3.0, 1.0], [3.0, 0.0]), ([1.0, -3.0], [0.0, -3.0])):
    trainable = {'params': {'w': jnp.array([values])}, 'learned': {}}
    seen, _ = method.effective(trainable, sparse, 'train', jnp.int32(5), None)
    assert seen['w'].tolist() == [expected]
