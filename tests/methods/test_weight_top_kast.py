"""Top-KAST against NumPy: the sets, the penalty, and what a training step leaves alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from one_run import mirrors, states_of

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup

TOP_KAST = slots.method('weight', 'top_kast')
SHAPE = (40, 30)
STEPS, PERIOD, RATE, SHARE, DENSITY = 8, 3, 1e-2, 0.25, 0.25
ADAM = {
  'model__init': 'gpt2',  # no zero head, so that every gradient counts from the first step
  'optimizer__clip': 0.0,
  'optimizer__weight_decay': 0.1,
  'optimizer__learning_rate': 0.02,
  'optimizer__ema': 0.9,
  'weight__name': 'top_kast',
  'weight__sparsity': 1 - DENSITY,
  'weight__dense': ('embed', 'norm', 'head', 'attention'),
  'weight__backward_share': SHARE,
  'weight__penalty_weight': RATE,
  'weight__period': PERIOD,
  'train__steps': STEPS,
}


def largest(magnitudes, density):
  """The largest entries of a matrix, as many as the density asks for, by a stable sort."""
  order = np.argsort(-magnitudes.ravel(), kind='stable')
  mask = np.zeros(magnitudes.size, bool)
  mask[order[: round(magnitudes.size * density)]] = True
  return mask.reshape(magnitudes.shape)


def backward(density, share=SHARE):
  return density + share * (1 - density)


def weights(seed):
  w = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
  w[:9] = np.round(w[:9])  # ties
  return {'w': jnp.asarray(w), 'b': jnp.ones(4)}


def started(density=DENSITY, **fields):
  method = TOP_KAST(total_steps=100, **fields)
  method.check()
  target = {'w': jnp.float32(density), 'b': None}
  return method, *method.init(jax.random.key(0), weights(0), target)


def sets_of(sparse):
  """Forward and backward sets by the path of the leaf."""
  return tree.named(sparse.extra['forward']), tree.named(sparse.extra['backward'])


@pytest.mark.parametrize('density', [0.013, 0.2, 1.0])
@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_the_sets_are_the_largest_magnitudes_and_lie_in_each_other(density, share):
  method, trainable, sparse = started(density, backward_share=share)
  moved = trainable | {'params': weights(1)}
  change = method.update(moved, sparse, {}, jnp.int32(100), jax.random.key(0))
  for params, state in ((weights(0), sparse), (weights(1), change.sparse)):
    (forward, outer), w = sets_of(state), np.abs(np.asarray(params['w']))
    assert forward.keys() == outer.keys() == {'w'}
    assert_array_equal(forward['w'], largest(w, density))
    assert_array_equal(outer['w'], largest(w, backward(density, share)))
    assert not (forward['w'] & ~outer['w']).any()
  assert change.trainable is moved and jax.tree.leaves(change.toggled) == []
  assert method.backward_density(density, 7) == pytest.approx(backward(density, share))
  assert [step for step in range(401) if method.due(step)] == [100, 200, 300, 400]


def test_the_sets_are_made_of_the_units_of_the_pattern():
  sparse = started(0.25, pattern='block:10', backward_share=1 / 3)[-1]
  tiles = np.abs(np.asarray(weights(0)['w'])).reshape(4, 10, 3, 10).mean(axis=(1, 3))
  for found, density in zip(sets_of(sparse), (0.25, 0.5)):
    assert_array_equal(found['w'], np.kron(largest(tiles, density), np.ones((10, 10), bool)))


def test_the_gradient_at_what_the_model_sees_goes_to_the_backward_set():
  method, trainable, sparse = started()
  w, (forward, outer) = np.asarray(weights(0)['w']), sets_of(sparse)
  scale = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)

  def loss(trainable):
    seen, density = method.effective(trainable, sparse, 'train', 0, None)
    return jnp.sum(scale * (seen['w'] - 1) ** 2) + jnp.sum(seen['b']), density

  gradient, density = jax.grad(loss, has_aux=True)(trainable)
  seen = np.where(forward['w'], w, 0)
  want = np.where(outer['w'], 2 * scale * (seen - 1), 0)
  assert_allclose(gradient['params']['w'], want, rtol=1e-6)
  assert np.abs(want[~np.asarray(forward['w'])]).max() > 1
  assert_array_equal(gradient['params']['b'], np.ones(4))
  assert float(density['w']) == pytest.approx(DENSITY)
  params, masks = method.finalize(trainable, sparse, 100)
  assert_array_equal(params['w'], seen)
  assert_array_equal(masks['w'], forward['w'])


@pytest.mark.parametrize('share', [0.0, 0.5])
@pytest.mark.parametrize('norm', ['l1', 'l2'])
def test_the_penalty_is_that_of_the_formula_and_so_is_its_gradient(norm, share):
  method, trainable, sparse = started(norm=norm, penalty_weight=0.3, backward_share=share)
  value, gradient = jax.value_and_grad(lambda t: method.penalty(t, sparse, None))(trainable)
  w = np.asarray(weights(0)['w'], np.float64)
  first, all_trained = largest(np.abs(w), DENSITY), largest(np.abs(w), backward(DENSITY, share))
  parts = [np.where(first, w, 0), np.where(all_trained & ~first, w, 0) / DENSITY]
  if norm == 'l1':
    want, slope = sum(np.abs(p).sum() for p in parts), sum(np.sign(p) for p in parts)
    slope = np.where(first, slope, slope / DENSITY)
  else:
    lengths = [np.sqrt((p**2).sum()) for p in parts]
    want = sum(lengths)
    slope = parts[0] / lengths[0] + (parts[1] / lengths[1] / DENSITY if share else 0)
  assert float(value) == pytest.approx(0.3 * want, rel=1e-5)
  assert_allclose(gradient['params']['w'], 0.3 * slope, rtol=1e-5, atol=1e-7)
  assert not np.asarray(gradient['params']['b']).any()


@pytest.mark.parametrize('norm', ['l1', 'l2'])
@pytest.mark.parametrize(('density', 'scale'), [(1.0, 1.0), (DENSITY, 0.0)])
def test_a_matrix_that_is_dense_or_zero_pays_no_penalty(density, scale, norm):
  method, trainable, sparse = started(density, norm=norm)
  scaled = jax.tree.map(lambda w: scale * w, trainable)
  value, gradient = jax.value_and_grad(lambda t: method.penalty(t, sparse, None))(scaled)
  assert value == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'norm': 'l3'}, ["config.weight.norm 'l3'", 'valid: l1, l2']),
    ({'pattern': 'neuron'}, ["config.weight.pattern='neuron'", 'units lie in one matrix']),
  ],
)
def test_bad_fields_are_refused_in_one_line(fields, words, tiny_config):
  with pytest.raises(UserError) as refused:
    setup(tiny_config(weight__name='top_kast', **{f'weight__{k}': v for k, v in fields.items()}))
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line


@pytest.fixture(scope='module')
def trained(tiny_config):
  """The run, its states on the host from step 0 to the last, and what the steps read."""
  run = setup(tiny_config(**ADAM))
  batches = run.data.train_iterator(rng.data_seed(0))
  tokens = [next(batches) for _ in range(STEPS)]
  return run, states_of(run, run.program.init(0, run.target), tokens), tokens


def test_no_weight_outside_the_backward_set_changes(trained):
  _, states, _ = trained
  left = 0
  for before, after in itertools.pairwise(states):
    _, outer = sets_of(before.sparse)
    assert len(outer) == 2
    for old, new in zip(mirrors(before), mirrors(after)):
      for path, trained_here in outer.items():
        assert_array_equal(new[path][~trained_here], old[path][~trained_here])
        assert (new[path][trained_here] != old[path][trained_here]).mean() > 0.5
    moments = mirrors(before)[2]
    left += sum(int((moments[path][~outer[path]] != 0).sum()) for path in outer)
  assert left > 0, 'no weight with moments left the backward set'


def test_the_sets_of_a_run_change_only_at_updates_and_by_magnitude(trained):
  _, states, _ = trained
  entered = 0
  for step, (before, after) in enumerate(itertools.pairwise(states)):
    (forward, outer), params = sets_of(after.sparse), mirrors(after)[0]
    old_forward, old_outer = sets_of(before.sparse)
    for path, w in params.items():
      if path not in forward:
        continue
      if step in (PERIOD, 2 * PERIOD):
        assert_array_equal(forward[path], largest(np.abs(w), DENSITY))
        assert_array_equal(outer[path], largest(np.abs(w), backward(DENSITY)))
        entered += int((forward[path] & ~old_forward[path]).sum())
        assert not (forward[path] & ~old_outer[path]).all()
      else:
        assert_array_equal(forward[path], old_forward[path])
        assert_array_equal(outer[path], old_outer[path])
  assert entered > 0, 'no weight entered the forward set'
  assert jax.tree.leaves(states[-1].sparse.masks) == []


def test_a_step_takes_the_dense_gradient_and_the_penalty_on_the_backward_set(trained):
  run, states, tokens = trained
  before, after = states[0], states[1]
  forward, outer = sets_of(before.sparse)
  params = before.trainable['params']
  seen = tree.map_named(lambda p, w: np.where(forward[p], w, 0) if p in forward else w, params)

  @jax.jit
  def gradient(params):
    def loss(params):
      logits = run.program.model.apply({'params': params}, tokens[0][:, :-1], mode='eval')
      chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0][:, 1:, None], axis=-1)
      return -jnp.mean(chosen)

    return jax.grad(loss)(params)

  dense, w = tree.named(jax.device_get(gradient(seen))), tree.named(params)
  first_moment = mirrors(after)[2]
  for path, trained_here in outer.items():
    slope = np.sign(w[path]) * np.where(forward[path], RATE, RATE / DENSITY)
    want = np.where(trained_here, dense[path] + slope, 0)
    assert_allclose(first_moment[path], 0.1 * want, rtol=1e-3, atol=1e-6)
    assert not first_moment[path][~trained_here].any()


def test_a_step_is_charged_with_the_backward_set(trained):
  run, states, _ = trained
  target = {path: float(d) for path, d in tree.named(run.target).items()}
  sizes = {path: w.size for path, w in tree.named(states[0].trainable['params']).items()}
  prunable = sum(sizes[path] for path in target)
  costs = run.program.costs

  def at(density):  # two FLOPs a weight and token
    return costs.training_pass({}) - 2 * prunable * (1 - density)

  forward = costs.training_pass(target)
  assert forward == pytest.approx(at(DENSITY))
  for step in (0, PERIOD, 7):
    spent = run.program.step_flops(step, forward, target)
    assert spent == pytest.approx(2 * at(DENSITY) + at(backward(DENSITY)))


def test_a_continued_run_has_its_sets_and_is_the_run_that_was_not_stopped(trained, tmp_path):
  run, states, tokens = trained
  stopped = 5  # between two choices of the sets
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[stopped], run.data.train_iterator(0))
  state = checkpoints.restore(run.program.init(0, run.target))
  checkpoints.close()
  jax.tree.map(assert_array_equal, state.sparse.extra, states[stopped].sparse.extra)
  for step in range(stopped, STEPS):
    state, _ = run.program.step(step)(state, tokens[step])
  jax.tree.map(assert_array_equal, state.replace(key=None), states[-1].replace(key=None))
