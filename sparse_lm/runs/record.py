"""Writing a run's log, history, best state, checkpoints and result into its folder.

`runs/loop.py` trains one run and keeps its record. `runs/pack_loop.py` trains several runs at once and
keeps the record of each.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.errors import Diverged
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.evals import Values
from sparse_lm.runs.best import Best
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.evaluate import result_of
from sparse_lm.runs.history import History
from sparse_lm.runs.setup import Setup
from sparse_lm.runs.workdir import Workdir
from sparse_lm.train import states
from sparse_lm.train.states import TrainState
from sparse_lm.weights import checks, parts


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """The metrics of an evaluation by name, and the masks of the evaluated model."""

  values: Values
  masks: Tree


class Record:
  """The record of one run.

  Attributes:
    setup: the run.
    folder, checkpoints, best: the open stores of the record.
    history: the part of a checkpoint besides the state; set by `resume`.
    newest: metrics of the newest step that was added.
    evaluated: the newest evaluation, or `None` before the first.
  """

  def __init__(self, run: Setup, folder: Workdir, checkpoints: Checkpoints, best: Best) -> None:
    self.setup, self.folder, self.checkpoints, self.best = run, folder, checkpoints, best
    self.history: History
    self.newest: dict[str, float] = {}
    self.evaluated: Evaluated | None = None
    self._meter = run.meter()

  def resume(
    self, state: TrainState, masks: Tree, batches: grain.DatasetIterator
  ) -> TrainState | None:
    """Restores the state and the position of `batches` from the newest checkpoint.

    Returns `None` if there is no checkpoint: the run begins at step 0.

    Args:
      state: the state at step 0.
      masks: the masks with which `state` is evaluated.
      batches: the iterator over training batches.
    """
    self.history = History(masks, self.setup.config.train.steps, self.setup.inherited)
    restored = self.checkpoints.restore(state, batches, history=self.history)
    step = 0 if restored is None else int(restored.step)
    self.checkpoints.set_aside_after(step)
    self.best.forget_after(step)
    self.folder.resume_metrics(step)
    if restored is None:
      self.history.work = self.history.work.plus(self._meter.at_start())
    return restored

  def compare_plans(self, first: int) -> str | None:
    """Returns a warning if the steps so far were planned for another `config.train.steps`.

    Args:
      first: steps that are already done.
    """
    before, now = self.history.planned_steps, self.setup.config.train.steps
    if before == now:
      return None
    self.history.planned_steps = now
    optimizer = self.setup.program.optimizer
    rate = self.setup.config.optimizer.learning_rate
    old, new = (
      float(dataclasses.replace(optimizer, steps=steps, learning_rate=rate).rate()(first))
      for steps in (before, now)
    )
    return (
      f'steps 1 to {first} ran on schedules of {before} steps, and config.train.steps is {now} now: '
      f'from here on all schedules span {now} steps (the learning rate goes from {old:.2g} to '
      f'{new:.2g})'
    )

  def add(self, step: int, metrics: dict[str, float]) -> None:
    """Adds the metrics of a step, counted from 1.

    Raises Diverged if the loss, the gradient or a score is not finite.
    """
    self.newest, flags = checks.split(metrics)
    for name in ('loss', 'gradient_norm'):
      self.check_finite(name, self.newest[name], step)
    checks.raise_for(self.setup.program.method, flags, f'at step {step}')
    self.history.add_loss(self.newest['loss'])
    flops = self._meter.step(step - 1, self.newest['flops_pass'])
    self.history.work = self.history.work.plus(flops)

  def log(self, step: int, measured: Mapping[str, float]) -> float:
    """Logs the newest metrics together with `measured`. Returns the mean loss since the last line."""
    loss = self.history.take_mean_loss()
    self.folder.log(step, self.newest | {'loss': loss} | measured)
    return loss

  def log_evaluation(self, step: int, found: Evaluated, moved: Mapping[str, float]) -> None:
    """Logs an evaluation. Raises Diverged if its loss is not finite.

    Args:
      step: steps that are done.
      found: the evaluation.
      moved: changes of the masks since the last evaluation, from `observe.connections`.
    """
    self.evaluated = found
    self.check_finite('validation loss', found.values['val_loss'], step)
    self.folder.log(step, found.values | moved)
    self.history.masks = found.masks

  def check_scores(self, non_finite: Mapping[str, bool], step: int) -> None:
    """Raises Diverged if a score of masks that every step chooses is not finite after `step`."""
    checks.raise_for(self.setup.program.method, non_finite, f'after step {step}')

  def at_final_density(self, step: int) -> bool:
    """True if the model has its final sparsity. A denser model is never kept as the best state."""
    target = {path: float(final) for path, final in tree.named(self.setup.target).items()}
    planned = parts.densities(self.setup.program.method, target, step)
    return all(planned[path] <= final + 1e-6 for path, final in target.items())

  def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves a checkpoint whose steps were all added, after a check of its masks."""
    states.check_masks(self.setup.program.method, state)
    self.checkpoints.save(state, batches, self.history)
    self.best.settle()

  def check_finite(self, name: str, value: float, step: int) -> None:
    """Raises Diverged, naming the last good checkpoint, if `value` is not finite."""
    if math.isfinite(value):
      return
    steps = self.checkpoints.steps()
    good = f'checkpoint {steps[-1]} in {self.checkpoints.path}' if steps else 'none yet'
    raise Diverged(
      f'{name} is {value} at step {step}; nothing was saved from it; last good: {good}; try a lower '
      f'config.optimizer.learning_rate than {self.setup.config.optimizer.learning_rate}'
    )

  def finish(self, state: TrainState, found: Evaluated) -> JsonObject:
    """Writes result.json, which marks the run as finished, and returns its contents."""
    speeds = self.folder.logged('tokens_per_second')
    tokens = self.setup.config.data.batch * self.setup.config.data.context
    measured = {
      'best_val_loss': self.best.loss,
      'best_step': self.best.step,
      'train_step_ms': 1e3 * tokens / float(np.median(speeds)) if speeds else None,
    }
    if packed := self.folder.logged('packed_step_ms'):
      measured['packed_step_ms'] = float(np.median(packed))
      measured['packed_runs'] = self.folder.logged('packed_runs')[-1]
    measured |= found.values
    result = result_of(self.setup, state, found.masks, measured, self.history.work)
    self.folder.write_result(result)
    return result


@contextlib.contextmanager
def opened(run: Setup, folder: Workdir) -> Iterator[Record]:
  """Opens the record of a run. Its folder is locked while the block runs."""
  with contextlib.ExitStack() as stack:
    stack.callback(folder.close)
    folder.open()
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder.path)))
    best = stack.enter_context(contextlib.closing(Best(folder.path)))
    yield Record(run, folder, checkpoints, best)
