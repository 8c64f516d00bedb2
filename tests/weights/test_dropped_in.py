"""Scores and signals, one small file each in folders beside the package, are run as its own."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import sparse_lm.signals
from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs.build import build
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.setup import setup
from sparse_lm.train import one_shot

FISHER = '''
"""Weights times the root of the mean squared gradient."""

import dataclasses
from typing import ClassVar

import jax

from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Fisher(ScoredMethod):
  """Keeps the weights whose removal changes the loss most, by its diagonal second-order expansion."""

  traits: ClassVar[Traits] = Traits(needs=('grads_sq',))

  def scores(self, trainable, signals):
    return jax.tree.map(lambda w, g: w * w * g, trainable['params'], signals['grads_sq'])
'''
GRADS_SQ = '''
"""Mean squared gradients."""

from typing import ClassVar

from sparse_lm.core.signal import TrainingSignal


class GradsSq(TrainingSignal):
  """The square of the gradient, over three steps."""

  batches: ClassVar[int] = 3

  def of_gradient(self, weights, gradient):
    return gradient * gradient
'''
MOVED = '''
"""Weights that have moved."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Moved(ScoredMethod):
  """Scores that learn from the gradient of each weight."""

  traits: ClassVar[Traits] = Traits(learns_scores=True)

  def first_scores(self, key, params):
    return jax.tree.map(lambda w: jnp.zeros(w.shape), params)

  def scores(self, trainable, signals):
    return trainable['learned']
'''
X_ABS = '''
"""Mean magnitudes of inputs."""

import jax
import jax.numpy as jnp

from sparse_lm.core.signal import CalibrationSignal


class XAbs(CalibrationSignal):
  """The mean magnitude of each input."""

  def of_inputs(self, x_NxI):
    return jnp.sum(jnp.abs(x_NxI), axis=0)
'''
PLAIN = {
  'model__init': 'gpt2',
  'optimizer__name': 'sgd',
  'optimizer__momentum': 0.0,
  'optimizer__schedule': 'constant',
  'optimizer__warmup': 0.0,
  'optimizer__weight_decay': 0.0,
  'optimizer__clip': 0.0,
  'optimizer__learning_rate': 0.1,
}
STEPS = 12


@pytest.fixture(scope='module', autouse=True)
def folder(tmp_path_factory, dropped_in):
  """A folder beside the package that its methods and signals are found in too."""
  root = tmp_path_factory.mktemp('mine')
  found = {
    'sparse_lm.methods.weight': {'fisher': FISHER, 'moved': MOVED},
    'sparse_lm.signals': {'grads_sq': GRADS_SQ, 'x_abs': X_ABS},
  }
  with contextlib.ExitStack() as stack:
    for package, files in found.items():
      (own := root / package).mkdir()
      stack.enter_context(dropped_in(package, own, files))
    yield


def gradient_of(program):
  def loss(params, tokens):
    logits = program.model.apply({'params': params}, tokens[:, :-1], mode='eval')
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(chosen)

  return jax.jit(jax.grad(loss))


def trained(config):
  run = setup(config)
  batches = run.data.train_iterator(rng.data_seed(0))
  state, states, tokens = run.program.init(0, run.target), [], []
  for step in range(STEPS):
    tokens.append(next(batches))
    states.append(jax.device_get(state))
    state, _ = run.program.step(step)(state, tokens[-1])
  return run, [*states, jax.device_get(state)], tokens


def largest(scores, count):
  mask = np.zeros(scores.size, bool)
  mask[np.argsort(-scores, axis=None, kind='stable')[:count]] = True
  return mask.reshape(scores.shape)


def test_a_signal_over_several_steps_is_their_mean_when_masks_are_updated(tiny_config, tmp_path):
  fields = {'weight__start': 0.1, 'weight__end': 0.5, 'weight__period': 5}
  config = tiny_config(**PLAIN, weight__name='fisher', weight__sparsity=0.5, **fields)
  run, states, tokens = trained(config)
  method, gradient = run.program.method, gradient_of(run.program)
  assert [step for step in range(STEPS) if method.due(step)] == [1, 6]
  # Steps 0 and 1 are all that comes before the first update; the window of the second is full.
  assert [s for s in range(STEPS) if method.backward_density(0.5, s)] == [0, 1, 4, 5, 6]
  for due, window in ((1, (0, 1)), (6, (4, 5, 6))):
    grads = [gradient(states[step].trainable['params'], tokens[step]) for step in window]
    squares = jax.tree.map(lambda *g: np.mean(np.square(np.float64(g)), axis=0), *grads)
    share = 1 - 0.5 * (1 - (1 - (due - 1) / 5) ** 3)
    for path, mask in tree.named(states[due + 1].sparse.masks).items():
      old = tree.named(states[due].sparse.masks)[path]
      step = tree.named(grads[-1])[path]
      w = tree.named(states[due].trainable['params'])[path] - 0.1 * step * old
      scores = np.where(old, w.astype(float) ** 2 * tree.named(squares)[path], -1)
      want = largest(scores, round(mask.size * share))
      assert (mask != want).mean() <= 0.004, path  # equal but for what rounding ties
  assert all(np.mean(m) == 0.5 for m in jax.tree.leaves(states[-1].sparse.masks))


def test_sums_of_signals_are_restored_from_a_checkpoint(tiny_config, tmp_path):
  fields = {'weight__start': 0.1, 'weight__end': 0.5, 'weight__period': 5}
  config = tiny_config(**PLAIN, weight__name='fisher', weight__sparsity=0.5, **fields)
  run, states, _ = trained(config)
  (collected,) = states[6].signals.values()
  assert int(collected.batches) == 2 and np.abs(jax.tree.leaves(collected.sums)[0]).max() > 0
  assert [int(s.signals[''].batches) for s in states] == [0, 1, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(states[6], run.data.train_iterator(0))
  restored = checkpoints.restore(run.program.init(1, run.target))
  checkpoints.close()
  jax.tree.map(assert_array_equal, restored.signals, states[6].signals)
  assert not any(jax.tree.leaves(setup(tiny_config()).start().signals))  # others collect nothing


def test_a_score_of_gradients_prunes_trained_models_by_calibration_text(tiny_config):
  program, target = build(tiny_config(weight__name='fisher', weight__sparsity=0.5), 23)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda w: jnp.asarray(draw.normal(0, 0.3, w.shape), jnp.float32),
    program.init(0, target).trainable['params'],
  )
  tokens = draw.integers(0, 23, (6, 16)).astype(np.int32)
  trainable, sparse = one_shot.prune(program, params, {}, target, tokens, 3, seed=0)
  gradient = gradient_of(program)
  grads = [gradient(params, tokens[i : i + 3]) for i in (0, 3)]
  for path, mask in tree.named(sparse.masks).items():
    square = np.mean([np.square(np.float64(tree.named(g)[path])) for g in grads], axis=0)
    w = np.asarray(tree.named(params)[path])
    want = largest(w.astype(float) ** 2 * square, mask.size // 2)
    assert (np.asarray(mask) != want).mean() <= 0.004, path
    assert_array_equal(tree.named(trainable['params'])[path], np.where(mask, w, 0))


@pytest.mark.slow
def test_learned_scores_train_and_select(tiny_config):
  fields = {'weight__start': 0.0, 'weight__end': 0.25}
  config = tiny_config(**PLAIN, weight__name='moved', weight__sparsity=0.5, **fields)
  run, states, tokens = trained(config)
  params, masks = run.program.finalize(states[-1])
  learned, gradient = states[-1].trainable['learned'], gradient_of(run.program)
  # The identity of movement pruning under plain SGD: S = -rate * sum of gradient times weight.
  moved = jax.tree.map(lambda s: np.zeros(s.shape), learned)
  for state, batch in zip(states[:-1], tokens):
    seen, _ = run.program.method.effective(state.trainable, state.sparse, 'train', state.step, None)
    grads, weights = gradient(seen, batch), state.trainable['params']
    moved = tree.map_named(
      lambda path, s, grads=grads, weights=weights: (
        s - 0.1 * np.asarray(tree.named(grads)[path] * tree.named(weights)[path], float)
      ),
      moved,
    )
  for path, scores in tree.named(learned).items():
    assert_allclose(scores, tree.named(moved)[path], rtol=1e-3, atol=1e-7)
    mask = np.asarray(tree.named(masks)[path])
    assert_array_equal(mask, largest(scores, mask.size // 2))
    assert not np.asarray(tree.named(params)[path])[~mask].any()
    # A dropped weight keeps its value, and is not trained while it is dropped.
    assert (tree.named(states[-1].trainable['params'])[path] != 0).all()


HALF = '''
from sparse_lm.core.signal import TrainingSignal


class Half(TrainingSignal):
  """Half."""
'''


def test_a_signal_without_its_function_is_refused_in_one_line(tmp_path, dropped_in):
  with (
    dropped_in('sparse_lm.signals', tmp_path, {'half': HALF}),
    pytest.raises(UserError, match=r'Half does not define of_gradient'),
  ):
    sparse_lm.signals.signal('half')


def test_calibration_signals_are_found_too():
  x = np.random.default_rng(0).normal(size=(7, 3)).astype('f')
  (found,) = sparse_lm.signals.from_calibration(('x_abs', 'grads_sq')).values()
  assert_allclose(found.of_inputs(x), np.abs(x).sum(axis=0), rtol=1e-6)
