"""What happens before the first optimizer step of a run whose masks are chosen then."""

import jax

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs.setup import Setup
from sparse_lm.train.states import TrainState
from sparse_lm.weights import parts


def prune_at_start(run: Setup, state: TrainState) -> TrainState:
  """`state`, which is of step 0 and is donated, with the masks that methods choose before that step.

  Their signals are of the batches with which training begins; the iterator is one of its own, so that
  training reads them again. Nothing else changes: no moments, no running thresholds or biases.

  Raises UserError where a parameter that is to be pruned has no signal at all.
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
  state, silent = program.update_at_start(state, collected)
  target = jax.device_get(tree.named(run.target))
  if missed := [path for path, flag in jax.device_get(silent).items() if flag and target[path] < 1]:
    raise UserError(
      f'every signal of {missed[0]} ({len(missed)} such parameters) is zero before step 0, so that its '
      f'weights cannot be ranked; valid: config.model.init=gpt2 (where it is fan_in the head starts at '
      'zero, and with it all gradients below), config.init_from, or those parameters in '
      'config.weight.dense'
    )
  return state
