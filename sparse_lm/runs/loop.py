"""The training loop."""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import NoReturn

import grain
import jax
from ml_collections import ConfigDict

from sparse_lm.core import rng
from sparse_lm.core.records import JsonObject
from sparse_lm.measure import observe
from sparse_lm.runs.at_start import prune_at_start
from sparse_lm.runs.console import Console, notes, opening
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.record import Evaluated, Record, opened
from sparse_lm.runs.setup import setup
from sparse_lm.runs.timing import StepTimer
from sparse_lm.runs.workdir import Workdir
from sparse_lm.train.states import TrainState
from sparse_lm.weights import parts


def train(config: ConfigDict, workdir: str, progress: bool = True) -> JsonObject:
  """Trains a run, or continues it from its newest checkpoint.

  Args:
    config: the run's config, from `runs.configs.load`.
    workdir: the run's folder. A finished run is not trained again.
    progress: whether to show progress on stderr.

  Returns:
    The contents of result.json.

  Raises:
    UserError: invalid input (before anything is written), a workdir in which another process trains, or a
      full disk.
    Diverged: a loss that is no longer finite. The message names the last good checkpoint.
    SystemExit: SIGTERM or Ctrl-C, after the state was saved.
  """
  run = setup(config)
  folder = Workdir(workdir, run.config, run.data)
  if finished := folder.result(config.train.steps):
    return finished
  start = None
  if parts.at_start(run.program.method) and not folder.has_checkpoints():
    # This can fail, so it runs before anything is written.
    start = prune_at_start(run, run.start())
  with opened(run, folder) as record:
    return _Loop(record, progress).run(start)


class Stop:
  """Records SIGTERM and Ctrl-C while a run trains, so that the run can be saved before it ends.

  Attributes:
    signum: the number of the received signal, or `None`.
  """

  def __init__(self) -> None:
    self.signum: int | None = None

  def __enter__(self) -> 'Stop':
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


def leave(console: Console, signum: int, step: int) -> NoReturn:
  """Ends the process after a signal. The state of `step` has been saved."""
  console.say(f'stopped at step {step}, saved; the same command continues', always=True)
  raise SystemExit(128 + signum)


class _Loop:
  """Trains one run until its last step."""

  def __init__(self, record: Record, progress: bool) -> None:
    self.record, self.progress = record, progress
    self.setup, self.config, self.program = record.setup, record.setup.config, record.setup.program
    self.timer = StepTimer()
    self.pending: list[tuple[int, dict[str, jax.Array]]] = []

  def run(self, start: TrainState | None) -> JsonObject:
    """Trains, logs, evaluates and saves. Returns the contents of result.json.

    Args:
      start: the state at step 0 with the masks that were chosen before it. `None` if no masks were
        chosen, or if there is a checkpoint.
    """
    state, batches = self._start(start)
    first, every, name = int(state.step), self.config.train, self.record.folder.path.name
    with Stop() as stop, Console(self.progress, name, first, every.steps) as self.console:
      self.console.say(opening(self.setup, name, first))
      for note in notes(self.setup):
        self.console.say(note)
      self.console.warn_once('plan', self.record.compare_plans(first))
      self._check_scores(state)
      for done in range(first + 1, every.steps + 1):
        state = self._step(state, next(batches), done)
        # Read once: a signal that comes later waits for the next step, which is saved.
        last, signum = done == every.steps, stop.signum
        if last or done % every.log_every == 0:
          self._log(done)
        if last or done % every.eval_every == 0:
          self._evaluate(state, done)
        if last or signum or done % every.checkpoint_every == 0:
          self._save(state, batches)
        if signum:
          leave(self.console, signum, done)
      # A run that was stopped after its last step has logged that step's evaluation already.
      return self.record.finish(state, self.record.evaluated or self._measure(state))

  def _start(self, start: TrainState | None) -> tuple[TrainState, grain.DatasetIterator]:
    """Returns the state and the data iterator as of the newest checkpoint, or at step 0."""
    state = self.setup.start() if start is None else start
    batches = self.setup.data.train_iterator(rng.data_seed(self.config.seed), on_device=True)
    _, masks = self.program.finalize(state)
    restored = self.record.resume(state, masks, batches)
    if restored is not None:
      return restored, batches
    if start is None and parts.at_start(self.program.method):  # no checkpoint could be read
      state = prune_at_start(self.setup, state)
      _, self.record.history.masks = self.program.finalize(state)
    return state, batches

  def _step(self, state: TrainState, tokens_BxL1: jax.Array, done: int) -> TrainState:
    """Dispatches a step. After it, `done` steps are done."""
    teacher = self.setup.teacher
    taught = None if teacher is None else teacher.readout(tokens_BxL1[:, :-1])
    state, metrics = self.program.step(done - 1)(state, tokens_BxL1, taught)
    self.timer.step(metrics)
    self.pending.append((done, metrics))
    self.console.step()
    return state

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Waits for all dispatched steps and stops their timer while the block runs."""
    jax.device_get(self.pending[-1:])
    self.timer.stop()
    self._fetch()
    yield
    self.timer.start()

  def _fetch(self) -> None:
    """Copies the metrics of new steps to the host, and checks that they are finite."""
    for step, metrics in self.pending:
      self.record.add(step, observe.scalars(jax.device_get(metrics)))
    self.pending = []

  def _log(self, step: int) -> None:
    """Logs the metrics of the newest step, and the mean loss and the speed since the last line."""
    with self._paused():
      seconds = self.timer.take()
      tokens, measured, status = self.config.data.batch * self.config.data.context, {}, ''
      if seconds is not None:
        measured['tokens_per_second'] = tokens / seconds
        status = f', {tokens / seconds:,.0f} tokens/s'
      loss = self.record.log(step, measured)
      self.console.status(f'loss {loss:.3f}{status}')

  def _evaluate(self, state: TrainState, step: int) -> None:
    """Logs the validation loss and the changes of the masks, and saves the state if it is the best."""
    with self._paused():
      self.console.status('evaluating')
      record, found = self.record, self._measure(state)
      record.log_evaluation(step, found, observe.connections(found.masks, record.history.masks))
      loss, work = found.values['val_loss'], record.history.work
      best = record.at_final_density(step) and record.best.offer(self.program, state, loss, work)
      self.console.say(f'step {step:,}: validation loss {loss:.4f}{" (the best)" if best else ""}')

  def _check_scores(self, state: TrainState) -> None:
    """Raises Diverged for NaN or infinite scores of masks that every step chooses."""
    flags = jax.device_get(self.program.non_finite(state))
    self.record.check_scores(flags, int(state.step))

  def _measure(self, state: TrainState) -> Evaluated:
    self._check_scores(state)
    params, masks = self.program.finalize(state)
    return Evaluated(evaluate(self.setup, params, state.model_state), masks)

  def _save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves a checkpoint, after a check that all losses up to it are finite."""
    with self._paused():
      self.record.save(state, batches)
