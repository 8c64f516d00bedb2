"""The training loop."""

import contextlib
import dataclasses
import math
import signal
import threading
import types
from collections.abc import Iterator

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import Diverged
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.evals import Values
from sparse_lm.measure import observe
from sparse_lm.measure.observe import scalars
from sparse_lm.model import lm
from sparse_lm.runs.at_start import prune_at_start
from sparse_lm.runs.best import Best
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.console import Console, opening
from sparse_lm.runs.evaluate import evaluate, result_of
from sparse_lm.runs.history import History
from sparse_lm.runs.setup import Setup, setup
from sparse_lm.runs.timing import StepTimer
from sparse_lm.runs.workdir import Workdir
from sparse_lm.train import states
from sparse_lm.train.states import TrainState
from sparse_lm.weights import parts

LOST = 0.5  # fraction of the updates that rounding undoes, above which a run warns


def train(config: ConfigDict, workdir: str, progress: bool = True) -> JsonObject:
  """Trains what `config` describes, or continues it, and returns the contents of result.json.

  Args:
    config: from `core.config.load`.
    workdir: folder of the run; one that holds a finished run is not trained again.
    progress: whether to show on stderr what is going on.

  Raises:
    UserError: bad input, before anything is written; a workdir that another process trains in; a
      disk that is full.
    Diverged: a loss that is no longer finite, with the last good checkpoint named.
    SystemExit: SIGTERM or Ctrl-C, after the state has been saved.
  """
  run = setup(config)
  folder = Workdir(workdir, config, run.data)
  if finished := folder.result(config.train.steps):
    return finished
  start = None
  if parts.at_start(run.program.method) and not folder.has_checkpoints():
    # Before anything is written, because it may find that there is nothing to choose masks by.
    start = prune_at_start(run, run.start())
  with contextlib.ExitStack() as stack:
    stack.callback(folder.close)
    folder.open()
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(folder.path)))
    best = stack.enter_context(contextlib.closing(Best(folder.path)))
    return _Loop(run, folder, checkpoints, best, progress).run(start)


class _Stop:
  """Notes SIGTERM and Ctrl-C while a run is under way, so that it can save first."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def __enter__(self) -> '_Stop':
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for signum in (signal.SIGTERM, signal.SIGINT):
        self._old[signum] = signal.signal(signum, self._note)
    return self

  def _note(self, signum: int, frame: types.FrameType | None) -> None:
    self.signum = signum

  def __exit__(self, *_: object) -> None:
    for signum, handler in self._old.items():
      signal.signal(signum, handler)


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """An evaluation: its values by name, and the masks of what was evaluated."""

  values: Values
  masks: Tree


class _Loop:
  """One run from where it stands to its last step."""

  def __init__(
    self, run: Setup, folder: Workdir, checkpoints: Checkpoints, best: Best, progress: bool
  ) -> None:
    self.setup, self.folder, self.checkpoints, self.best = run, folder, checkpoints, best
    self.config, self.program = run.config, run.program
    self.progress = progress
    self.timer, self.meter = StepTimer(), run.meter()
    self.pending: list[tuple[int, dict[str, jax.Array]]] = []
    self.newest: dict[str, float] = {}  # metrics of the newest step on the host
    self.evaluated: Evaluated | None = None

  def run(self, start: TrainState | None) -> JsonObject:
    """Trains, logs, evaluates and saves.

    Args:
      start: of step 0, with masks that were chosen before it; `None` where none are, or a checkpoint is
        there.
    """
    state, batches = self._start(start)
    first, every, name = int(state.step), self.config.train, self.folder.path.name
    with _Stop() as stop, Console(self.progress, name, first, every.steps) as self.console:
      self.console.say(opening(self.setup, name, first))
      for note in (*self.program.method.notes, *lm.notes(self.program.model)):
        self.console.say(note)
      self._compare_plans(first)
      for done in range(first + 1, every.steps + 1):
        state = self._step(state, next(batches), done)
        last = done == every.steps
        if last or done % every.log_every == 0:
          self._log(done)
        if last or done % every.eval_every == 0:
          self._evaluate(state, done)
        if last or stop.signum or done % every.checkpoint_every == 0:
          self._save(state, batches)
        if stop.signum:
          self._leave(stop.signum, done)
      return self._finish(state)

  def _start(self, start: TrainState | None) -> tuple[TrainState, Iterator[np.ndarray]]:
    """The state and the data where the newest checkpoint left them, or at step 0."""
    state = self.setup.start() if start is None else start
    batches = self.setup.data.train_iterator(rng.data_seed(self.config.seed))
    _, masks = self.program.finalize(state)
    self.history = History(masks, self.config.train.steps, self.setup.inherited)
    restored = self.checkpoints.restore(state, batches, history=self.history)
    step = 0 if restored is None else int(restored.step)
    self.checkpoints.set_aside_after(step)
    self.best.forget_after(step)
    self.folder.resume_metrics(step)
    if restored is not None:
      return restored, batches
    if start is None and parts.at_start(self.program.method):  # no checkpoint could be read
      state = prune_at_start(self.setup, state)
      _, self.history.masks = self.program.finalize(state)
    self.history.work = self.history.work.plus(self.meter.at_start())
    return state, batches

  def _compare_plans(self, first: int) -> None:
    """Says that schedules were stretched, where the steps so far were planned for another length."""
    before, now = self.history.planned_steps, self.config.train.steps
    if before != now:
      optimizer = self.program.optimizer
      old, new = (
        float(dataclasses.replace(optimizer, steps=steps).rate()(first)) for steps in (before, now)
      )
      self.console.warn_once(
        'plan',
        f'steps 1 to {first} ran on schedules of {before} steps, and config.train.steps is {now} now: '
        f'from here on all schedules span {now} steps (the learning rate goes from {old:.2g} to '
        f'{new:.2g})',
      )
      self.history.planned_steps = now

  def _step(self, state: TrainState, tokens_BxL1: np.ndarray, done: int) -> TrainState:
    """Dispatches the step after which `done` are done."""
    teacher = self.setup.teacher
    taught = None if teacher is None else teacher.logits(tokens_BxL1[:, :-1])
    state, metrics = self.program.step(done - 1)(state, tokens_BxL1, taught)
    self.timer.step(metrics)
    self.pending.append((done, metrics))
    self.console.step()
    return state

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Waits for the steps so far. Their time holds neither that of the block nor of their metrics."""
    jax.device_get(self.pending[-1:])
    self.timer.stop()
    self._fetch()
    yield
    self.timer.start()

  def _fetch(self) -> None:
    """Brings the steps since the last call to the host and refuses what is not finite."""
    for step, metrics in self.pending:
      self.newest = scalars(jax.device_get(metrics))
      for name in ('loss', 'gradient_norm'):
        self._check_finite(name, self.newest[name], step)
      self.history.add_loss(self.newest['loss'])
      flops = self.meter.step(step - 1, self.newest['flops_pass'])
      self.history.work = self.history.work.plus(flops)
    self.pending = []

  def _log(self, step: int) -> None:
    """Logs the newest step, with the mean loss and the speed since the last line."""
    with self._paused():
      seconds, loss = self.timer.take(), self.history.take_mean_loss()
      values, status = self.newest | {'loss': loss}, f'loss {loss:.3f}'
      if seconds is not None:
        speed = self.config.data.batch * self.config.data.context / seconds
        values['tokens_per_second'] = speed
        status += f', {speed:,.0f} tokens/s'
      self.folder.log(step, values)
      self.console.status(status)
      if self.newest.get('lost_updates', 0) > LOST:
        self.console.warn_once(
          'rounding',
          f'at step {step} {self.newest["lost_updates"]:.0%} of the updates are lost to the rounding '
          f'of {self.config.model.param_dtype} parameters; remedy: config.model.param_dtype=float32, '
          'which leaves the computation in config.model.dtype',
        )

  def _evaluate(self, state: TrainState, step: int) -> None:
    """Logs the validation loss and what the connections did since the last evaluation, and keeps the
    best state."""
    with self._paused():
      self.console.status('evaluating')
      self.evaluated = found = self._measure(state)
      self._check_finite('validation loss', found.values['val_loss'], step)
      moved = observe.connections(found.masks, self.history.masks)
      self.folder.log(step, found.values | moved)
      self.history.masks = found.masks
      loss, work = found.values['val_loss'], self.history.work
      best = self._at_final_density(step) and self.best.offer(self.program, state, loss, work)
      self.console.say(f'step {step:,}: validation loss {loss:.4f}{" (the best)" if best else ""}')

  def _at_final_density(self, step: int) -> bool:
    """Whether the model is as sparse as it is to be: one that is denser still is no best state."""
    target = {path: float(final) for path, final in tree.named(self.setup.target).items()}
    planned = parts.densities(self.program.method, target, step)
    return all(planned[path] <= final + 1e-6 for path, final in target.items())

  def _measure(self, state: TrainState) -> Evaluated:
    params, masks = self.program.finalize(state)
    return Evaluated(evaluate(self.setup, params, state.model_state), masks)

  def _save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Never saves a state whose losses were not seen to be finite, or less sparse than its masks."""
    with self._paused():
      states.check_masks(self.program.method, state)
      self.checkpoints.save(state, batches, self.history)
      self.best.settle()

  def _check_finite(self, name: str, value: float, step: int) -> None:
    if math.isfinite(value):
      return
    steps = self.checkpoints.steps()
    good = f'checkpoint {steps[-1]} in {self.checkpoints.path}' if steps else 'none yet'
    raise Diverged(
      f'{name} is {value} at step {step}; nothing was saved from it; last good: {good}; try a lower '
      f'config.optimizer.learning_rate than {self.config.optimizer.learning_rate}'
    )

  def _leave(self, signum: int, step: int) -> None:
    self.console.say(f'stopped at step {step}, saved; the same command continues', always=True)
    raise SystemExit(128 + signum)

  def _finish(self, state: TrainState) -> JsonObject:
    # A run that was stopped after its last step has logged that step's evaluation already.
    found = self.evaluated or self._measure(state)
    speeds = self.folder.logged('tokens_per_second')
    tokens = self.config.data.batch * self.config.data.context
    measured = {
      'best_val_loss': self.best.loss,
      'best_step': self.best.step,
      'train_step_ms': 1e3 * tokens / float(np.median(speeds)) if speeds else None,
    }
    measured |= found.values
    result = result_of(self.setup, state, found.masks, measured, self.history.work)
    self.folder.write_result(result)
    return result
