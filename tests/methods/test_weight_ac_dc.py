"""AC/DC against NumPy: its phases, its masks, and dense phases that train as a dense model does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from one_run import mirrors, states_of

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup

AC_DC = slots.method('weight', 'ac_dc')
# Fractions of the run, as the authors' config has them: masks close and open in turn.
CLOSE = (0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70, 0.85)
OPEN = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)
SHAPE = (40, 30)
# Phases of several steps: sparse from 4, dense from 8 and sparse from 14.
STEPS, DENSITY = 16, 0.25
PHASES = {'start': 0.25, 'phase': 0.25, 'last_dense': 0.375, 'end': 0.875}
CLOSED = [4 <= step < 8 or step >= 14 for step in range(STEPS + 1)]
COMMON = {
  'model__init': 'gpt2',
  'optimizer__ema': 0.9,
  'weight__dense': ('embed', 'norm', 'head', 'attention'),
  'train__steps': STEPS,
}


def largest(magnitudes, count):
  """The `count` largest entries of a matrix, by a stable sort."""
  order = np.argsort(-magnitudes.ravel(), kind='stable')
  mask = np.zeros(magnitudes.size, bool)
  mask[order[:count]] = True
  return mask.reshape(magnitudes.shape)


def closed_at(steps, step):
  """Whether masks are closed when `step` steps are done: the last switch until then closes them."""
  switches = sorted([(share, True) for share in CLOSE] + [(share, False) for share in OPEN])
  done = [closes for share, closes in switches if round(share * steps) <= step]
  return bool(step and done and done[-1])


@pytest.mark.parametrize('steps', [*range(1, 42), 100, 333, 1000])
def test_the_phases_are_those_of_the_paper_in_a_run_of_any_length(steps):
  method = AC_DC(total_steps=steps)
  closed = [closed_at(steps, step) for step in range(steps + 1)]
  assert closed[-1] and not closed[0]
  assert [method.density(0.3, step) for step in range(steps)] == [
    0.3 if sparse else 1.0 for sparse in closed[:-1]
  ]
  assert [method.due(step) for step in range(steps)] == [
    closed[step] != closed[step + 1] or step + 1 == steps for step in range(steps)
  ]
  if steps == 100:
    switches = [step + 1 for step in range(steps) if method.due(step)]
    assert switches == [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85, 100]


@pytest.mark.parametrize(('fields', 'switches'), [
  (PHASES, [25, 50, 88]),
  ({'start': 0.0, 'end': 1.0}, [1, *range(5, 86, 5), 100]),
  ({'start': 0.5, 'end': 0.5}, [50]),
  ({'start': 0.2, 'phase': 0.3, 'last_dense': 0.0, 'end': 0.9}, [20, 50, 80]),
  ({'start': 0.2, 'phase': 0.3, 'last_dense': 0.2, 'end': 0.6}, [20, 40, 60]),
])  # fmt: skip
def test_fields_say_when_masks_close_and_open(fields, switches):
  method = AC_DC(total_steps=100, **fields)
  method.check()
  assert [step + 1 for step in range(100) if method.due(step)] == sorted({*switches, 100})


@pytest.mark.parametrize('pattern', ['unstructured', 'block:10'])
def test_masks_are_the_largest_magnitudes_when_they_close_and_full_when_they_open(pattern):
  method, draw = AC_DC(total_steps=40, pattern=pattern), np.random.default_rng(0)
  w, mask = draw.standard_normal(SHAPE).astype(np.float32), np.ones(SHAPE, bool)
  trainable, sparse = method.init(
    jax.random.key(0), {'w': jnp.asarray(w), 'b': jnp.ones(4)}, {'w': jnp.float32(0.25), 'b': None}
  )
  update = jax.jit(lambda t, s, step: method.update(t, s, {}, step, jax.random.key(0)))
  seen = []
  for step in range(40):
    drift = draw.standard_normal(SHAPE).astype(np.float32)
    moved = {'w': 0.25 * trainable['params']['w'] + drift, 'b': jnp.ones(4)}
    trainable = method.constrain(trainable | {'params': moved}, sparse)
    w = np.where(mask, np.float32(0.25) * w + drift, 0)
    if method.due(step):
      change = update(trainable, sparse, jnp.int32(step))
      trainable, sparse = change.trainable, change.sparse
      old = mask
      if mask.all():
        tiles = np.abs(w).reshape(4, 10, 3, 10).mean(axis=(1, 3))
        tiles = np.kron(largest(tiles, 3), np.ones((10, 10), bool))
        mask = largest(np.abs(w), 300) if pattern == 'unstructured' else tiles
        assert mask.sum() == 300
      elif not closed_at(40, step + 1):
        mask = np.ones(SHAPE, bool)
      w = np.where(mask & old, w, 0)
      assert_array_equal(change.toggled['w'], mask != old)
      seen.append(mask)
    assert_array_equal(sparse.masks['w'], mask)
    assert_array_equal(trainable['params']['w'], w)
  assert len(seen) == 16 and any((a != b).any() for a, b in zip(seen[:15:2], seen[2:15:2]))
  params, masks = method.finalize(trainable, sparse, jnp.int32(40))
  assert_array_equal(params['w'], np.where(masks['w'], w, 0))
  assert masks['w'].sum() == 300 and masks['b'] is None


def test_masks_that_are_closed_stay_so_where_a_longer_run_closes_them():
  # The end of a run of 20 steps lies in a dense phase of one of 25, which closes the masks after it.
  longer = AC_DC(total_steps=25)
  assert longer.density(0.25, 20) == 1.0 and longer.due(20)
  w = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
  state = longer.init(jax.random.key(0), {'w': w}, {'w': jnp.float32(0.25)})
  first = AC_DC(total_steps=20).update(*state, {}, jnp.int32(19), jax.random.key(0))
  again = longer.update(first.trainable, first.sparse, {}, jnp.int32(20), jax.random.key(0))
  assert first.toggled['w'].sum() == 900 and not again.toggled['w'].any()
  assert_array_equal(again.sparse.masks['w'], first.sparse.masks['w'])


def test_masks_that_are_open_close_where_a_shorter_run_ends_in_what_was_a_dense_phase():
  # Step 32 of 40 is in the last dense phase, and in the last sparse one of 36 steps.
  first, shorter = AC_DC(total_steps=40), AC_DC(total_steps=36)
  assert first.density(0.25, 32) == 1.0 and shorter.density(0.25, 32) == 0.25
  w = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
  trainable, sparse = shorter.init(jax.random.key(0), {'w': w}, {'w': jnp.float32(0.25)})
  for step in filter(shorter.due, range(32, 36)):
    change = shorter.update(trainable, sparse, {}, jnp.int32(step), jax.random.key(0))
    trainable, sparse = change.trainable, change.sparse
  assert sparse.masks['w'].mean() == 0.25


@pytest.mark.parametrize(('fields', 'words'), [
  ({'start': 0.9}, ['config.weight.end=0.85', 'config.weight.start=0.9 or more']),
  ({'phase': 0.0}, ['config.weight.phase=0.0', '[0.001, 1]']),
  ({'last_dense': 1.5}, ['config.weight.last_dense=1.5', '[0, 1]']),
  ({'pattern': 'neuron'}, ["config.weight.pattern='neuron'", 'units lie in one matrix']),
])  # fmt: skip
def test_bad_fields_are_refused_in_one_line(fields, words, tiny_config):
  with pytest.raises(UserError) as refused:
    setup(tiny_config(weight__name='ac_dc', **{f'weight__{k}': v for k, v in fields.items()}))
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line


@pytest.fixture(scope='module')
def trained(tiny_config):
  """The run, its states on the host from step 0 to the last, and what the steps read."""
  fields = {f'weight__{name}': value for name, value in PHASES.items()}
  own = {'weight__name': 'ac_dc', 'weight__sparsity': 1 - DENSITY}
  run = setup(tiny_config(**COMMON, **own, **fields))
  batches = run.data.train_iterator(rng.data_seed(0))
  tokens = [next(batches) for _ in range(STEPS)]
  return run, states_of(run, run.program.init(0, run.target), tokens), tokens


def test_every_step_of_a_run_has_the_exact_count_of_its_phase(trained):
  _, states, _ = trained
  for step, state in enumerate(states):
    counts = [(int(m.sum()), m.size) for m in jax.tree.leaves(state.sparse.masks)]
    assert counts == [(128 if CLOSED[step] else 512, 512)] * 2, step


def test_a_dense_phase_trains_as_the_dense_model_does_to_the_bit(trained, tiny_config):
  _, states, tokens = trained
  dense = setup(tiny_config(**COMMON, weight__name='none'))
  fresh = dense.program.init(0, dense.target)
  for first, last in ((0, 3), (8, 13)):  # the step before a phase ends closes the masks after it
    start = states[first].replace(sparse=fresh.sparse, key=fresh.key)
    for found, want in zip(states_of(dense, start, tokens[first:last], first), states[first:]):
      for ours, theirs in zip(mirrors(want), mirrors(found)):
        assert ours.keys() == theirs.keys()
        for path, value in theirs.items():
          assert_array_equal(ours[path], value, err_msg=path)


def test_weights_of_a_dense_phase_start_at_zero_with_zero_moments_and_train(trained):
  _, states, _ = trained
  masks = tree.named(states[7].sparse.masks)
  for held in mirrors(states[8]):
    for path, mask in masks.items():
      assert not held[path][~mask].any() and (held[path][mask] != 0).mean() > 0.9
  for held in mirrors(states[9]):
    for path, mask in masks.items():
      assert (held[path][~mask] != 0).mean() > 0.9
  # What is dropped in turn is zero too, with all that is kept of it.
  for step in (4, 7, 14, 16):
    for held in mirrors(states[step]):
      for path, mask in tree.named(states[step].sparse.masks).items():
        assert not held[path][~mask].any()


@pytest.mark.parametrize('stopped', [6, 10])
def test_a_run_continued_in_either_phase_is_the_run_that_was_not_stopped(
  trained, stopped, tmp_path
):
  run, states, tokens = trained
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[stopped], run.data.train_iterator(0))
  state = checkpoints.restore(run.program.init(0, run.target))
  checkpoints.close()
  last = states_of(run, state, tokens[stopped:], stopped)[-1]
  jax.tree.map(assert_array_equal, last.replace(key=None), states[-1].replace(key=None))
