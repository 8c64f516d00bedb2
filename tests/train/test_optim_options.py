"""Options for gradients, rates and decay, against NumPy."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from configs import base
from sparse_lm.core.errors import UserError
from sparse_lm.runs.build import build
from sparse_lm.train import optim


def optimizer(name='adamw', **fields):
  own = {'learning_rate': 0.08, 'schedule': 'linear', 'warmup': 0.0, 'final': 0.0, 'clip': 0.0}
  return optim.Optimizer(**{**base.get_config().optimizer, **own, **fields, 'name': name}, steps=4)


def trees(seed):
  draw = np.random.default_rng(seed)
  return {'w': draw.normal(size=(5, 3)).astype('f'), 'scale': draw.normal(size=3).astype('f')}


def adam(grads, momentum, b2, eps):
  """The direction after gradients in NumPy, float64."""
  first, second, step = 0.0, 0.0, len(grads)
  for g in grads:
    first = momentum * first + (1 - momentum) * g.astype(np.float64)
    second = b2 * second + (1 - b2) * np.square(g, dtype=np.float64)
  return first / (1 - momentum**step) / (np.sqrt(second / (1 - b2**step)) + eps)


@pytest.mark.parametrize('factors', [None, (1.0, 0.5, 0.25)])
def test_decay_that_comes_last_shrinks_the_updated_matrices_at_the_scaled_rate(factors):
  rate = [0.08 * (1 - step / 4) for step in range(3)]
  tx = optimizer(weight_decay=0.3, decay_last=True, eps=0.1, b2=0.95).transform()
  params, grads = trees(0), [trees(seed) for seed in (1, 2, 3)]
  state, want = tx.init(params), {name: p.astype(np.float64) for name, p in params.items()}
  for step, gradient in enumerate(grads):
    given = {} if factors is None else {'rate_factor': np.float32(factors[step])}
    updates, state = tx.update(gradient, state, params, **given)
    params = jax.tree.map(np.add, params, jax.device_get(updates))
    own = rate[step] * (1 if factors is None else factors[step])
    for name in want:
      direction = adam([g[name] for g in grads[: step + 1]], 0.9, 0.95, 0.1)
      want[name] = (want[name] - own * direction) * (1 - 0.3 * own * (name == 'w'))
      assert_allclose(params[name], want[name], rtol=1e-5, atol=1e-7)


def test_a_zero_that_the_update_leaves_stays_zero_under_decay():
  tx = optimizer('sgd', momentum=0.0, decay_last=True).transform()
  params = {'w': np.array([[0.0, 2.0]], 'f')}
  updates, _ = tx.update({'w': np.zeros((1, 2), 'f')}, tx.init(params), params)
  assert_array_equal(np.asarray(updates['w'])[0, 0], 0)
  assert_allclose(np.asarray(updates['w'])[0, 1], -0.08 * 0.1 * 2.0, rtol=1e-6)


@pytest.mark.parametrize('scale', [1e-2, 1.0, 1e4])
def test_a_normalized_gradient_has_unit_mean_square_over_all_parameters_together(scale):
  tx = optimizer('sgd', normalize=True, momentum=0.0, weight_decay=0.0).transform()
  params, grads = trees(0), {name: scale * g for name, g in trees(1).items()}
  updates, _ = tx.update(grads, tx.init(params), params)
  together = np.concatenate([g.ravel() for g in grads.values()]).astype(np.float64)
  rms = np.sqrt(np.mean(together**2)) + 1e-5
  for name, g in grads.items():
    assert_allclose(updates[name], -0.08 * g / rms, rtol=1e-5)
  updates, _ = tx.update(jax.tree.map(np.zeros_like, grads), tx.init(params), params)
  assert not any(np.asarray(u).any() for u in updates.values())


@pytest.mark.parametrize('name', optim.TESTED)
def test_a_rate_factor_scales_every_update(name):
  params, grads = trees(0), trees(1)
  tx = optimizer(name).transform()
  whole, _ = tx.update(grads, tx.init(params), params)
  part, _ = tx.update(grads, tx.init(params), params, rate_factor=np.float32(0.25))
  jax.tree.map(lambda p, w: assert_allclose(p, 0.25 * w, rtol=1e-6), part, whole)


def test_a_clip_beside_normalization_is_one_line_that_says_what_is_valid(tiny_config):
  with pytest.raises(UserError) as refused:
    build(tiny_config(optimizer__normalize=True, optimizer__clip=1.0), 20)
  assert str(refused.value) == (
    'config.optimizer.clip=1.0 is not valid; valid: 0, because config.optimizer.normalize already fixes '
    'the norm of the gradient'
  )
