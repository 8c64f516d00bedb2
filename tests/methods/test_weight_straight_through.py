import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.model import slots

MAGNITUDE = slots.method('weight', 'magnitude')


def started(final=0.2, start=0.0, end=0.0, **fields):
  fields |= {'start': start, 'end': end, 'apply': 'straight_through'}
  method = MAGNITUDE(total_steps=100, **fields)
  w = jax.random.normal(jax.random.key(0), (20, 25))
  trainable, sparse = method.init(jax.random.key(1), {'w': w}, {'w': jnp.float32(final)})
  return method, trainable, sparse


@pytest.mark.parametrize('step', [0, 1, 99, 100])
def test_without_a_ramp_the_final_sparsity_holds_from_the_first_step(step):
  method, trainable, sparse = started()
  seen, density = method.effective(trainable, sparse, 'train', jnp.int32(step), None)
  assert int((seen['w'] != 0).sum()) == 100
  assert float(density['w']) == pytest.approx(0.2)
  assert method.density(0.2, step) == pytest.approx(0.2)


def test_a_ramp_is_followed_in_every_step():
  method, trainable, sparse = started(start=0.1, end=0.6)
  effective = jax.jit(lambda step: method.effective(trainable, sparse, 'train', step, None))
  for step in (0, 10, 11, 35, 59, 60, 90):
    progress = min(max((step - 10) / 50, 0), 1)
    share = 1 - 0.8 * (1 - (1 - progress) ** 3)
    seen, density = effective(step)
    assert int((seen['w'] != 0).sum()) == round(500 * share)
    assert float(density['w']) == pytest.approx(round(500 * share) / 500)
    assert method.density(0.2, step) == pytest.approx(share, abs=1e-6)


def test_dropped_weights_keep_their_values():
  method, trainable, sparse = started()
  kept = method.constrain(trainable, sparse)['params']['w']
  np.testing.assert_array_equal(kept, trainable['params']['w'])
  assert method.backward_density(0.2, 5) == 1.0 and not method.due(5)
