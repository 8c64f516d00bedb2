"""Keeping the checkpoint of lowest validation loss at the final density, in the folder `best/`."""

import dataclasses
import math
import pathlib

from sparse_lm.runs.checkpoint import EVALUATED, Checkpoints
from sparse_lm.runs.run_folder import BEST
from sparse_lm.train import states
from sparse_lm.train.states import TrainState
from sparse_lm.train.step import Program
from sparse_lm.train.work import Work


def step_in(workdir: pathlib.Path) -> int | None:
  """Returns the step of a workdir's best checkpoint, `None` if there is none."""
  steps = [int(path.name) for path in (workdir / BEST).glob('*') if path.name.isdigit()]
  return max(steps, default=None)


class Best:
  """The best checkpoint of a run. It is for evaluation and export, so it has no optimizer state.

  An interrupted run continues from its newest checkpoint and repeats the later evaluations. The best
  state as of that checkpoint must therefore stay until there is a newer checkpoint. So the folder can
  hold several states. Each is better than the one before it, and the newest is the best.

  Attributes:
    loss: the lowest validation loss so far, in nats per token; infinity before the first evaluation.
    step: the step of that evaluation.
  """

  def __init__(self, workdir: pathlib.Path) -> None:
    self._checkpoints = Checkpoints(workdir, BEST, keep=None)
    self.loss, self.step = math.inf, 0

  def forget_after(self, step: int) -> None:
    """Removes the states after `step`, the step from which the run continues."""
    self._checkpoints.delete([kept for kept in self._checkpoints.steps() if kept > step])
    if numbers := self._checkpoints.newest_numbers():
      self.loss, self.step = numbers['val_loss'], numbers['step']

  def offer(self, program: Program, state: TrainState, loss: float, work: Work) -> bool:
    """Saves `state` if its validation loss is the lowest so far. Returns whether it is."""
    if not loss < self.loss:
      return False
    states.check_masks(program.method, state)
    self.loss, self.step = loss, int(state.step)
    numbers = {'val_loss': loss, 'step': self.step, 'work': dataclasses.asdict(work)}
    self._checkpoints.save(state, items=EVALUATED, numbers=numbers)
    return True

  def settle(self) -> None:
    """Removes all states but the best. The run must have a checkpoint that is at least as new."""
    self._checkpoints.delete(self._checkpoints.steps()[:-1])

  def close(self) -> None:
    """Waits until all files are written."""
    self._checkpoints.close()
