"""Optimizer steps in which some parameters rest, for every optimizer that supports masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.train import optim

DRAW = np.random.default_rng(0)
SHAPES = {'rests': (4, 3), 'half': (4, 3), 'moves': (4, 3), 'scale': (3,)}
PARAMS, *GRADIENTS = (
  {name: jnp.asarray(DRAW.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
  for _ in range(4)
)
HALF = np.arange(12).reshape(4, 3) % 2 == 0  # of a leaf, the weights that rest
RESTING = {'rests': True, 'half': jnp.asarray(HALF), 'moves': False, 'scale': False}


def optimizer(name):
  return optim.Optimizer(
    name,
    learning_rate=0.01,
    schedule='linear',  # the rate moves with the count, which goes on
    warmup=0.0,
    final=0.1,
    momentum=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decay_last=True,
    clip=1.0,
    normalize=False,
    ema=0.0,
    steps=10,
  )


@pytest.mark.parametrize('name', optim.TESTED)
def test_resting_weights_keep_their_moments_and_others_are_updated(name):
  tx = optimizer(name).transform()
  state = tx.init(PARAMS)
  for gradient in GRADIENTS[:2]:
    _, state = tx.update(gradient, state, PARAMS)
  whole, after = tx.update(GRADIENTS[2], state, PARAMS)
  updates, kept = jax.jit(lambda g, s, p: optim.update_unless_resting(tx, g, s, p, RESTING))(
    GRADIENTS[2], state, PARAMS
  )
  assert not np.asarray(updates['rests']).any() and np.asarray(whole['rests']).any()
  assert not np.asarray(updates['half'])[HALF].any() and np.asarray(whole['half'])[HALF].any()
  np.testing.assert_allclose(updates['half'][~HALF], whole['half'][~HALF], rtol=1e-5, atol=1e-8)
  for leaf in ('moves', 'scale'):
    np.testing.assert_allclose(updates[leaf], whole[leaf], rtol=1e-5, atol=1e-8)
  names = optax.tree_map_params(
    tx, lambda _, leaf: leaf, after, {n: n for n in SHAPES}, transform_non_params=lambda _: 'count'
  )
  leaves = [jax.tree.leaves(tree) for tree in (names, kept, state, after)]
  assert {*SHAPES, 'count'} == set(leaves[0])
  for leaf, now, before, whole_step in zip(*leaves):
    if leaf == 'rests':
      assert_array_equal(now, before)
      assert (np.asarray(before) != np.asarray(whole_step)).any()
    elif leaf == 'half':
      assert_array_equal(now[HALF], before[HALF])
      np.testing.assert_allclose(now[~HALF], whole_step[~HALF], rtol=1e-5, atol=1e-8)
    else:
      np.testing.assert_allclose(now, whole_step, rtol=1e-5, atol=1e-8)


def test_a_step_in_which_nothing_rests_is_the_optimizers():
  tx = optimizer('adamw').transform()
  nothing = dict.fromkeys(SHAPES, False)
  found = optim.update_unless_resting(tx, GRADIENTS[0], tx.init(PARAMS), PARAMS, nothing)
  jax.tree.map(assert_array_equal, found, tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS))
