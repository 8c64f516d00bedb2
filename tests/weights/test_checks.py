"""A weight method reads only the signals that it declares, and returns only finite scores."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core.errors import Diverged, UserError
from sparse_lm.runs.loop import train
from sparse_lm.runs.pack_loop import train_packed
from sparse_lm.runs.setup import setup
from sparse_lm.train import one_shot
from sparse_lm.weights.checks import DeclaredSignals
from sparse_lm.weights.one_shot import OneShot
from sparse_lm.weights.rewire import Rewiring
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits

PARAMS, TARGET = {'w': jnp.ones((4, 4))}, {'w': jnp.float32(0.5)}
INFINITE = '''
"""A score with one infinite value."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.weights.score import ScoredMethod


@dataclasses.dataclass(frozen=True)
class Infinite(ScoredMethod):
  """The negative logarithm of each weight's distance from the largest weight of its matrix."""

  def scores(self, trainable, signals):
    return jax.tree.map(lambda w: -jnp.log(w.max() - w), trainable['params'])
'''


def scoring(name):
  @dataclasses.dataclass(frozen=True)
  class Scored(ScoredMethod):
    traits: ClassVar[Traits] = Traits(needs=('grads',))

    def scores(self, trainable, signals):
      return jax.tree.map(jnp.multiply, trainable['params'], signals[name])

  return Scored


def growing(name):
  @dataclasses.dataclass(frozen=True)
  class Grown(Rewiring):
    traits: ClassVar[Traits] = Traits(needs=('grads',))

    def fraction(self, step):
      return jnp.float32(0.5)

    def growth(self, signals, noise):
      return signals[name]

  return Grown


def pruning(name):
  @dataclasses.dataclass(frozen=True)
  class Pruned(OneShot):
    traits: ClassVar[Traits] = Traits(needs=('grads',))

    def prune(self, params, signals, target):
      return params, jax.tree.map(lambda x: x > 0, signals[name])

  return Pruned


@pytest.mark.parametrize('reading, function', [
  (scoring, 'Scored.scores'), (growing, 'Grown.growth'), (pruning, 'Pruned.prune'),
])  # fmt: skip
@pytest.mark.parametrize('name, words', [
  ('x_sq', "not among the needs=('grads',) of its traits; valid: needs=('grads', 'x_sq')"),
  ('grad', "'grad': did you mean 'grads'?"),
  ('grads', ''),
])  # fmt: skip
def test_a_signal_that_needs_does_not_name_is_refused(reading, function, name, words):
  method = reading(name)(total_steps=10)
  trainable, sparse = method.init(jax.random.key(0), PARAMS, TARGET)
  update = jax.jit(
    lambda signals: method.update(trainable, sparse, signals, jnp.int32(5), jax.random.key(1))
  )
  if not words:
    assert update({'grads': PARAMS}).sparse.masks['w'].shape == (4, 4)
    return
  with pytest.raises(UserError) as refused:
    update({'grads': PARAMS})
  message = str(refused.value)
  assert function in message and words in message and '\n' not in message


def test_jax_maps_over_signals_as_over_a_dict():
  plain = {'b': jnp.arange(3.0), 'a': {'w': jnp.ones(2)}}
  signals = DeclaredSignals(plain, 'f', ('a', 'b'))
  doubled = jax.tree.map(lambda x: 2 * x, signals)
  assert doubled['b'].tolist() == [0, 2, 4] and doubled['a']['w'].tolist() == [2, 2]
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(signals)]
  assert paths == [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plain)
  ]


@pytest.fixture
def infinite(method, tiny_config):
  """Makes the config of a run whose scores are not finite."""
  method('weight', 'infinite', INFINITE)

  def load(seed=0, **fields):
    own = {'name': 'infinite', 'sparsity': 0.5} | fields
    return tiny_config(seed=seed, **{f'weight__{name}': value for name, value in own.items()})

  return load


WRONG = r'^Infinite gives weights of block_0/attention/key/kernel \(and 5 more matrices\) scores '


@pytest.mark.parametrize('fields, when', [
  ({'schedule': 'at_once', 'start': 0.5}, 'at step 7'),  # the update follows half of the 12 steps
  ({'schedule': 'at_start'}, 'before step 0'),
  ({'apply': 'straight_through'}, 'after step 0'),
])  # fmt: skip
def test_a_run_ends_at_scores_that_are_not_finite(infinite, fields, when, tmp_path):
  with pytest.raises(
    Diverged, match=f'{WRONG}that are NaN or infinite {when}; valid: finite scores$'
  ):
    train(infinite(**fields), str(tmp_path / 'run'), progress=False)
  assert not list((tmp_path / 'run').glob('checkpoints/[0-9]*'))


@pytest.mark.parametrize('fields, when', [
  ({'schedule': 'at_once', 'start': 0.5}, 'at step 7'), ({'apply': 'soft'}, 'after step 0'),
])  # fmt: skip
def test_packed_runs_end_at_scores_that_are_not_finite(infinite, fields, when, tmp_path):
  runs = [setup(infinite(seed=seed, **fields)) for seed in (0, 1)]
  outcomes = train_packed(runs, [str(tmp_path / str(seed)) for seed in (0, 1)], progress=False)
  assert all(isinstance(outcome, Diverged) and when in str(outcome) for outcome in outcomes)


def test_one_shot_pruning_refuses_scores_that_are_not_finite(infinite):
  run = setup(infinite())
  state = run.start()
  tokens = np.zeros((2, 16), np.int32)
  with pytest.raises(UserError, match=f'{WRONG}that are NaN or infinite on the calibration text'):
    one_shot.prune(
      run.program, state.trainable['params'], state.model_state, run.target, tokens, 2, 0
    )
