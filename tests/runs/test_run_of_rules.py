"""A run of `configs/weight_rules.py`, small: stopped and continued, causal, packed, decoded, charged."""

import pathlib

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import rng, tree
from sparse_lm.inference import formats
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import pack
from sparse_lm.model import lm, plans
from sparse_lm.plan import cost, executed
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load

WIDTH, CUT, STEPS = 64, 5, 12


@pytest.fixture(scope='module')
def config(tiny_config):
  """RigL updates its masks at 3 and 6, magnitude at 3, 5, 7 and 9: on both sides of the cut."""
  return tiny_config(
    'configs/weight_rules.py',
    model__width=WIDTH,
    model__hidden=2 * WIDTH,
    weight__rules__mlp__period=2,
    weight__rules__attention__period=3,
    optimizer__ema=0.9,
    train__steps=STEPS,
  )


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """The run that nothing stopped."""
  workdir = tmp_path_factory.mktemp('rules')
  train(config, str(workdir), progress=False)
  return load(str(workdir))


@pytest.fixture(scope='module')
def packed(finished, packed_by_bytes):
  """What is left of it."""
  return pack(finished.program.model, finished.params, finished.masks, finished.model_state)


def state_of(config, workdir):
  run = setup(config)
  checkpoints = Checkpoints(pathlib.Path(workdir))
  state = checkpoints.restore(run.program.init(0, run.target))
  checkpoints.close()
  return jax.device_get(state.replace(key=None))


@pytest.mark.slow
def test_a_run_stopped_between_the_updates_of_two_rules_continues_exactly(
  config, finished, tmp_path, train_until
):
  method = finished.program.method
  for part in method.parts.values():
    due = [step for step in range(STEPS) if part.due(step)]
    assert min(due) < CUT <= max(due)
  train_until(config, tmp_path, CUT)
  assert int(state_of(config, tmp_path).step) == CUT
  train(config, str(tmp_path), progress=False)
  found, want = state_of(config, tmp_path), state_of(config, finished.workdir)
  assert int(found.step) == STEPS
  assert jax.tree.structure(found) == jax.tree.structure(want)
  jax.tree.map(assert_array_equal, found, want)


def tokens_of(finished):
  return next(setup(finished.config).data.train_iterator(rng.data_seed(1)))[:2, :-1]


def test_no_logit_reads_a_later_token(finished):
  tokens = tokens_of(finished)
  for cut in (1, 8, 15):
    other = tokens.copy()
    other[:, cut:] = (other[:, cut:] + 1) % finished.program.model.spec.vocab
    moved = np.abs(finished.logits(other) - finished.logits(tokens)).max(axis=(0, 2))
    assert moved[:cut].max() <= 1e-6 and moved[cut:].max() > 1e-3


def test_packing_stores_each_rules_weights_in_its_own_format(finished, packed):
  masks = tree.named(finished.masks)
  for path, matrix in packed.matrices.items():
    runs, stored = formats.name_of(matrix.runs), formats.name_of(matrix.stored)
    if '/attention/' in path:
      assert (runs, stored) == ('block', 'block')
    elif '/mlp/' in path:
      assert stored == 'n_of_m' and matrix.runs.plain
      assert_array_equal(matrix.stored.kernel(), tree.named(finished.params)[path])
      assert np.asarray(masks[path]).mean() == 0.5
  assert len([path for path in packed.matrices if '/mlp/' in path]) == 2


def test_decoding_the_packed_model_equals_one_masked_pass(finished, packed):
  tokens = tokens_of(finished)
  want = np.asarray(finished.logits(tokens))
  decoder = Decoder(packed.model, packed.variables)
  logits, cache, _ = decoder.begin([tokens[0, :4]])
  for place in range(4, 9):
    assert_allclose(logits[0], want[0, place - 1], rtol=0, atol=1e-4 * np.abs(want).max())
    token = tokens[0, place : place + 1]
    logits, cache = decoder.decode(decoder.variables, cache, token, np.array([place]))


def test_a_decoded_token_costs_the_density_of_what_a_format_leaves_out(finished, packed):
  model = packed.model
  cache = lm.cache_shapes(model, packed.variables, 1)
  step = lambda v, t: model.apply(v, t, mode='decode', mutable=['cache'])  # noqa: E731
  token = jax.ShapeDtypeStruct((1, 1), np.int32)
  ran = executed.trace(step, {**packed.variables, 'cache': cache}, token).flops
  dense = plans.traced(model, model.spec.context, 'decode')
  # 2:4 saves bytes, and FLOPs where hardware has it: no format runs it.
  density = {path: 0.25 for path in tree.named(finished.masks) if '/attention/' in path}
  assert len(density) == 4
  charged = cost.forward_flops(dense.ledger, density) + sum(dense.uncharged.values())
  assert ran == pytest.approx(charged, rel=1e-9)
  assert finished.costs()['sparsity_prunable'] == pytest.approx((4 * 0.75 + 4 * 0.5) / 8)
