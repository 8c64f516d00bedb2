"""Weights that are held and saved in bfloat16; everything else that a step keeps stays float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.model import slots
from sparse_lm.prune import prune
from sparse_lm.runs import trained
from sparse_lm.runs.build import build
from sparse_lm.runs.loop import train
from sparse_lm.runs.workdir import read_log
from sparse_lm.train import rounding
from sparse_lm.train.optim import TESTED, Optimizer
from sparse_lm.weights.method import apply_masks

VOCAB = 20
ONE_SHOT = ('wanda', 'sparsegpt', 'alps')  # they rank weights by signals on calibration text
HALF = {'model__weights_dtype': 'bfloat16'}


def dtypes(found):
  return {
    leaf.dtype.name for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)
  }


def test_sums_are_rounded_at_random_with_the_mean_of_the_sum():
  """To a neighbour in bfloat16, as often as the distance says; what bfloat16 holds stays as it is."""
  weights = jnp.asarray([1.0, -1.0, 0.02, 3.0, 0.0, jnp.inf, 256.0], jnp.bfloat16)
  updates = jnp.asarray([2e-3, 1e-3, -1e-5, 0.0, 0.0, 1.0, -0.25], jnp.float32)
  keys = jax.random.split(jax.random.key(0), 4000)
  one = lambda key: rounding.add_updates({'w': weights}, {'w': updates}, key)['w']  # noqa: E731
  found = jax.vmap(one)(keys)
  assert found.dtype == jnp.bfloat16
  found = np.asarray(found, np.float64)
  exact = np.asarray(weights, np.float64) + np.asarray(updates, np.float64)
  gap = np.array([2**-7, 2**-7, 2**-13, 0, 0, 0, 1])
  for place, (want, size) in enumerate(zip(exact, gap)):
    values = np.unique(found[:, place])
    if size == 0:
      assert_array_equal(values, [want])
    else:
      assert len(values) == 2 and values[0] < want < values[1] and np.diff(values) <= size
      error = size / 2 / np.sqrt(len(keys))
      assert abs(found[:, place].mean() - want) < 4 * error


def test_float32_weights_are_added_as_optax_adds_them():
  draw = np.random.default_rng(0)
  weights, updates = ({'w': jnp.asarray(draw.normal(size=9), jnp.float32)} for _ in 'ab')
  found = rounding.add_updates(weights, updates, jax.random.key(0))
  assert_array_equal(found['w'], optax.apply_updates(weights, updates)['w'])


@pytest.mark.parametrize('name', TESTED)
def test_moments_and_updates_are_those_of_float32_weights(name, tiny_config):
  """The same numbers in bfloat16 and in float32 get the same updates, step after step."""
  config = tiny_config(optimizer__name=name, optimizer__weight_decay=0.1)
  tx = Optimizer.from_config(config, True, {}).transform()
  draw = np.random.default_rng(0)
  half = {'w': jnp.asarray(draw.normal(size=(3, 4)), jnp.bfloat16)}
  whole = rounding.in_float32(half)
  states = tx.init(half), tx.init(whole)
  for _ in range(3):
    gradient = {'w': jnp.asarray(draw.normal(size=(3, 4)), jnp.bfloat16)}
    ours, ours_state = tx.update(gradient, states[0], half)
    theirs, theirs_state = tx.update(rounding.in_float32(gradient), states[1], whole)
    states = ours_state, theirs_state
    assert_array_equal(ours['w'], theirs['w'])
  assert dtypes(states) <= {'float32'} and dtypes(ours) == {'float32'}


@pytest.mark.parametrize('name', sorted({*slots.names('weight')} - {*ONE_SHOT}))
def test_every_weight_method_trains_and_updates_its_masks(name, tiny_config):
  learns = name in ('none', 'l0', 'movement_soft')
  pruned = {} if learns else {'weight__sparsity': 0.5}
  config = tiny_config(
    weight__name=name, optimizer__ema=0.9, train__accumulation=2, **HALF, **pruned
  )
  program, target = build(config, VOCAB)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 17)).astype(np.int32)
  state = jax.eval_shape(program.init, 0, target)
  step = program.compiled(*program.updates(_due(program)))
  after, metrics = jax.eval_shape(step, state, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype))
  assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
  assert dtypes(after.trainable['params']) == {'bfloat16'}
  assert dtypes((after.opt_state, after.ema, after.trainable.get('learned', {}))) <= {'float32'}
  assert dtypes((after.signals, metrics)) <= {'float32'}


def _due(program):
  """A step in which masks are updated, else the first one."""
  return next((i for i in range(program.optimizer.steps) if program.updates(i)[0]), 0)


def _kind(leaf):
  return leaf.shape, leaf.dtype


@pytest.mark.slow  # three runs
def test_it_learns_as_float32_weights_do_and_resumes(tiny_config, train_until, tmp_path):
  given = {
    'weight__name': 'rigl',
    'weight__sparsity': 0.5,
    'weight__period': 3,
    'optimizer__ema': 0.5,
  }
  given |= {'train__steps': 30, 'train__checkpoint_every': 10}
  config = tiny_config(**HALF, **given)
  train(config, str(tmp_path / 'whole'), progress=False)
  train_until(config, tmp_path / 'cut', 15)
  train(config, str(tmp_path / 'cut'), progress=False)
  whole, cut = (trained.load(str(tmp_path / name)) for name in ('whole', 'cut'))
  assert dtypes(whole.params) == {'bfloat16'}
  for path, leaf in tree.named(whole.params).items():
    assert_array_equal(leaf, tree.named(cut.params)[path], err_msg=path)
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, whole.params, apply_masks(whole.params, whole.masks))
  )
  train(tiny_config(**given), str(tmp_path / 'float32'), progress=False)
  losses = [_losses(tmp_path / name) for name in ('whole', 'float32')]
  assert losses[0][-1] < losses[0][0] - 0.2
  assert_allclose(losses[0], losses[1], rtol=0.05)


def _losses(workdir):
  return [values['loss'] for _, values in read_log(workdir / 'metrics.jsonl') if 'loss' in values]


def test_a_run_starts_from_weights_of_another_dtype(tiny_config, tmp_path):
  train(tiny_config(train__steps=2), str(tmp_path / 'parent'), progress=False)
  child = tiny_config(
    train__steps=2, init_from=str(tmp_path / 'parent'), optimizer__learning_rate=0.0, **HALF
  )
  train(child, str(tmp_path / 'child'), progress=False)
  parent, child = (trained.load(str(tmp_path / name)) for name in ('parent', 'child'))
  assert dtypes(parent.params) == {'float32'} and dtypes(child.params) == {'bfloat16'}
  for path, leaf in tree.named(parent.params).items():
    assert_array_equal(tree.named(child.params)[path], leaf.astype(jnp.bfloat16), err_msg=path)


@pytest.mark.parametrize(
  'name', [n if n == 'sparsegpt' else pytest.param(n, marks=pytest.mark.slow) for n in ONE_SHOT]
)
def test_one_shot_pruning_keeps_the_dtype(name, tiny_config, tmp_path):
  train(tiny_config(train__steps=2, **HALF), str(tmp_path / 'dense'), progress=False)
  fields = {'weight.name': name, 'weight.sparsity': 0.5}
  prune(str(tmp_path / 'dense'), str(tmp_path / 'out'), fields, segments=8)
  found = trained.load(str(tmp_path / 'out'))
  assert dtypes(found.params) == {'bfloat16'}
  for path, mask in tree.named(found.masks).items():
    assert abs(np.mean(mask) - 0.5) < 0.02 and not np.any(tree.named(found.params)[path][~mask])
