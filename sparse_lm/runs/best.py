"""The checkpoint of lowest validation loss at the final density, kept in `best/` beside the newest."""

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
  """The step of a workdir's best state, `None` where it keeps none."""
  steps = [int(path.name) for path in (workdir / BEST).glob('*') if path.name.isdigit()]
  return max(steps, default=None)


class Best:
  """Parameters without an optimizer, to evaluate and to export: a run never continues from them.

  A run that is interrupted continues from its newest checkpoint and evaluates again what came after
  that. So the best state as of that checkpoint is removed only once there is a newer checkpoint;
  each state that is kept is better than those before it, and the newest is the best.

  Attributes:
    loss: lowest validation loss so far, in nats per token; infinity before the first evaluation.
    step: at which it was reached.
  """

  def __init__(self, workdir: pathlib.Path) -> None:
    self._checkpoints = Checkpoints(workdir, BEST, keep=None)
    self.loss, self.step = math.inf, 0

  def forget_after(self, step: int) -> None:
    """Removes states that are newer than `step`, from where the run continues."""
    self._checkpoints.delete([kept for kept in self._checkpoints.steps() if kept > step])
    if numbers := self._checkpoints.newest_numbers():
      self.loss, self.step = numbers['val_loss'], numbers['step']

  def offer(self, program: Program, state: TrainState, loss: float, work: Work) -> bool:
    """Keeps `state` if its validation loss is the lowest so far, and says whether it is."""
    if not loss < self.loss:
      return False
    states.check_masks(program.method, state)
    self.loss, self.step = loss, int(state.step)
    numbers = {'val_loss': loss, 'step': self.step, 'work': dataclasses.asdict(work)}
    self._checkpoints.save(state, items=EVALUATED, numbers=numbers)
    return True

  def settle(self) -> None:
    """Leaves the best state alone, now that the run has a checkpoint as new as it."""
    self._checkpoints.delete(self._checkpoints.steps()[:-1])

  def close(self) -> None:
    """Waits for the files."""
    self._checkpoints.close()
