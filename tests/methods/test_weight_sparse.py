"""Weight-sparse transformers: steps of the whole config against NumPy (METHODS.md 2.16)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import pack
from sparse_lm.model import slots
from sparse_lm.runs.build import build
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load
from sparse_lm.weights.rules import Rule, Rules

VOCAB, STEPS, LENGTH = 11, 12, 16
WeightSparse = slots.method('weight', 'weight_sparse')
# The axis of the channels that have a floor of 4: outputs of what enters, inputs of what leaves.
CHANNELS = {'up': 1, 'query': 1, 'key': 1, 'value': 1, 'down': 0, 'out': 0}
MATRICES = {'weight__sparsity': 0.5, 'weight__distribution': 'embed=0.25'}


def density_at(step, final):
  """From 1 at step 0 to its end at step 6."""
  return 1 - (1 - final) * min(step / 6, 1)


@pytest.fixture(scope='module')
def program(tiny_config):
  return build(tiny_config('configs/weight_sparse.py', **MATRICES), VOCAB)


def tokens_of(step):
  return np.random.default_rng(step).integers(0, VOCAB, (4, LENGTH + 1)).astype(np.int32)


@pytest.fixture(scope='module')
def states(program):
  """Every state of a run on the host."""
  program, target = program
  state = program.init(0, target)
  found = [jax.device_get(state)]
  for step in range(STEPS):
    state, _ = program.step(step)(state, tokens_of(step))
    found.append(jax.device_get(state))
  return found


def channel_axis(path):
  return CHANNELS.get(path.split('/')[-2])


def chosen(path, w, count):
  """The paper's two steps, by stable sorts: 4 of each channel first, then the largest of what is left."""
  score, axis = np.abs(w.astype(np.float64)), channel_axis(path)
  if axis is not None:
    lines = np.moveaxis(score, axis, 0)  # a view: a channel is a row
    for row in lines:
      row[np.argsort(-row, kind='stable')[:4]] = np.inf
  mask = np.zeros(w.size, bool)
  mask[np.argsort(-score, axis=None, kind='stable')[:count]] = True
  return mask.reshape(w.shape)


def test_every_step_is_that_of_numpy(program, states):
  """Gradient over its RMS, Adam, rate by density, the mask, and then decay."""
  program, target = program
  finals = {path: float(density) for path, density in tree.named(target).items()}
  assert {finals['embed/tokens'], finals['embed/head/kernel']} == {132 / 176}
  assert set(finals.values()) == {132 / 176, 0.5}

  @jax.jit
  def gradient(params, tokens):
    def loss(params):
      logits = program.model.apply({'params': params}, tokens[:, :-1], mode='train')
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    return jax.grad(loss)(params)

  first = second = dict.fromkeys(tree.named(states[0].trainable['params']), 0.0)
  for step, (before, after) in enumerate(itertools.pairwise(states)):
    params, masks = tree.named(before.trainable['params']), tree.named(after.sparse.masks)
    grads = tree.named(jax.device_get(gradient(before.trainable['params'], tokens_of(step))))
    together = np.concatenate([g.ravel() for g in grads.values()]).astype(np.float64)
    rms = np.sqrt(np.mean(together**2)) + 1e-5
    rate = 4 * 1.28e-2 * (1 - step / STEPS) * np.sqrt(0.5 / density_at(step, 0.5))
    for path, w in params.items():
      g = grads[path] / rms
      first = first | {path: 0.9 * first[path] + 0.1 * g}
      second = second | {path: 0.95 * second[path] + 0.05 * g**2}
      root = np.sqrt(second[path] / (1 - 0.95 ** (step + 1)))
      want = w - rate * first[path] / (1 - 0.9 ** (step + 1)) / (root + 0.1)
      if path in finals:
        count = round(w.size * density_at(step, finals[path]))
        assert_array_equal(masks[path], chosen(path, want, count), err_msg=f'{path} at {step}')
        want = np.where(masks[path], want, 0)
      if w.ndim > 1:
        want = want * (1 - 0.1 * rate)
      got = tree.named(after.trainable['params'])[path]
      assert_allclose(got, want, rtol=1e-4, atol=2e-6, err_msg=f'{path} at {step}')
      assert_array_equal(got == 0, want == 0)


def test_floors_hold_and_zeroed_weights_come_back_with_their_moments(states):
  came_back = 0
  for before, after in itertools.pairwise(states):
    old, new = tree.named(before.sparse.masks), tree.named(after.sparse.masks)
    for path, mask in new.items():
      axis = channel_axis(path)
      assert axis is None or mask.sum(axis=1 - axis).min() >= 4
      came_back += int((mask & ~old[path]).sum())
  assert came_back > 0
  # Only the table and vectors have no mask; Adam's moments of zeroed weights go on.
  assert set(tree.named(after.trainable['params'])) - set(new) == {
    *('embed/bigrams', 'norm/scale', 'block_0/norm_1/scale', 'block_0/norm_2/scale')
  }
  moments = optax.tree_utils.tree_get(after.opt_state, 'mu')
  mu = tree.named(moments['params'])['block_0/mlp/up/kernel']
  # Without a gradient are weights whose input or output is never among the largest.
  assert (mu[~new['block_0/mlp/up/kernel']] != 0).mean() > 0.5


def test_the_rate_follows_the_sparsest_matrices_also_where_rules_own_them():
  method = WeightSparse(total_steps=100)
  target = {'up': jnp.float32(1 / 64), 'embed': jnp.float32(1 / 16), 'norm': None}
  for step in (0, 1, 20, 50, 99):
    present = 1 - (1 - 1 / 64) * min(max(step - 1, 0) / 49, 1)
    want = np.sqrt(1 / 64 / present)
    assert_allclose(method.rate_factor(target, jnp.int32(step)), want, rtol=1e-5)
    # The pass of a step runs at what the step before left.
    assert_allclose(method.density(1 / 64, step + 1), present, rtol=1e-6)
    parts = (Rule('a', method, frozenset({'embed'})), Rule('b', method, frozenset({'up'})))
    together = Rules(100, parts).rate_factor(target, jnp.int32(step))
    assert_allclose(together, want, rtol=1e-5)
  assert method.density(1 / 64, 0) == 1


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_undisturbed_one_and_decodes_packed_as_it_was_trained(
  tiny_config, tmp_path, train_until
):
  config = tiny_config('configs/weight_sparse.py', **MATRICES, train__log_every=12)
  train_until(config, tmp_path / 'cut', 4)
  found = []
  for name in ('cut', 'whole'):
    train(config, str(tmp_path / name), progress=False)
    found.append(load(str(tmp_path / name)))
  run, whole = found
  assert run.step == STEPS
  jax.tree.map(assert_array_equal, (run.params, run.masks), (whole.params, whole.masks))

  tokens = np.random.default_rng(0).integers(0, VOCAB, (1, LENGTH)).astype(np.int32)
  logits = run.logits(tokens)
  packed = pack(run.program.model, run.params, run.masks, run.model_state).variables
  decoder = Decoder(run.program.model, packed)
  decoded, cache, _ = decoder.begin([tokens[0, :8]])
  assert_allclose(decoded, logits[:, 7], rtol=1e-3, atol=1e-4)
  for place in range(8, LENGTH):
    position_B = np.full(1, place, np.int32)
    decoded, cache = decoder.decode(packed, cache, tokens[:, place], position_B)
    assert_allclose(decoded, logits[:, place], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('fields', 'words'), [
  ({'weight__sparsity': 0.9}, ["pattern 'floor:4'", '26 of 256', '64 in total', 'at most 0.75']),
  ({'weight__start': 0.6}, ['config.weight.end=0.5', '0.6 or more']),
  ({'weight__pattern': 'neuron'}, ["config.weight.pattern='neuron'", 'cannot grow from zero']),
])  # fmt: skip
def test_bad_fields_are_refused_in_one_line_that_says_what_is_valid(fields, words, tiny_config):
  with pytest.raises(UserError) as refused:
    build(tiny_config('configs/weight_sparse.py', **{**MATRICES, **fields}), VOCAB)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message
