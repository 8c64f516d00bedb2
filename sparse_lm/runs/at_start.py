"""Choosing masks before the first optimizer step, for methods that prune at initialization."""

import jax

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs.setup import Setup
from sparse_lm.train.states import TrainState
from sparse_lm.weights import checks, parts


def prune_at_start(run: Setup, state: TrainState) -> TrainState:
  """Returns the state at step 0 with the masks that its methods choose before training.

  The methods read signals from the first training batches. Training reads these batches again, because
  it has its own iterator. Everything else in the state stays as it is. The argument `state` is donated.

  Raises UserError if every signal of a parameter that is to be pruned is zero, or a score is not finite.
  """
  program = run.program
  wanted = parts.at_start(program.method)
  if not wanted:
    return state
  collected = parts.collect_at_start(program.method, state.trainable['params'], state.sparse.target)
  batches = run.data.train_iterator(rng.data_seed(run.config.seed))
  for number in range(parts.batches_at_start(program.method)):
    tokens_BxL1 = next(batches)
    taught = None if run.teacher is None else run.teacher.readout(tokens_BxL1[:, :-1])
    names = tuple(name for name, most in wanted.items() if number < most)
    collected = program.collect_at_start(state, collected, tokens_BxL1, taught, number, names)
  state, silent, non_finite = program.update_at_start(state, collected)
  checks.raise_for(program.method, jax.device_get(non_finite), 'before step 0')
  target = jax.device_get(tree.named(run.target))
  if missed := [path for path, flag in jax.device_get(silent).items() if flag and target[path] < 1]:
    raise UserError(
      f'every signal of {missed[0]} ({len(missed)} such parameters) is zero before step 0, so its '
      'weights cannot be ranked; valid: config.model.init=gpt2 (with fan_in the head starts at zero, and '
      'so do the gradients of all layers below), config.init_from, or these parameters in '
      'config.weight.dense'
    )
  return state
