"""The training loop of a pack: several runs that the device executes as one program."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from sparse_lm.core import rng, tree
from sparse_lm.core.errors import Diverged, UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.measure import observe
from sparse_lm.runs import lock
from sparse_lm.runs.console import Console, notes, opening
from sparse_lm.runs.evaluate import evaluate_packed
from sparse_lm.runs.loop import Stop, leave
from sparse_lm.runs.packs import CHUNK, Pack
from sparse_lm.runs.record import Evaluated, Record, opened
from sparse_lm.runs.setup import Setup
from sparse_lm.runs.workdir import Workdir
from sparse_lm.train import packed
from sparse_lm.train.packed import Feed, PackedMetrics
from sparse_lm.train.states import TrainState
from sparse_lm.train.work import Work

Outcome = JsonObject | Diverged


def train_packed(
  runs: Sequence[Setup], workdirs: Sequence[str], progress: bool = True
) -> list[Outcome]:
  """Trains runs as one program, or continues them, and returns the contents of each one's result.json.

  Each run keeps a folder of its own, in which it can be continued alone or packed. Checkpoints and best
  states are written at the end, or when a signal stops the pack, and not every
  `config.train.checkpoint_every` steps. Results equal those of the runs alone up to the rounding of
  float32, because sums are added up in another order.

  Args:
    runs: runs that can be packed: `packs.difference` is `None` for each pair of them.
    workdirs: the runs' folders; a run that is finished already is not trained again.
    progress: whether to show progress on stderr.

  Returns:
    For each run its result; for a run whose loss is no longer finite the error that says so. The other
    runs of its pack go on.

  Raises:
    UserError: runs that cannot be packed, before anything is written; see also `loop.train`.
    SystemExit: SIGTERM or Ctrl-C, after all states have been saved.
  """
  outcomes: dict[int, Outcome] = {}
  folders = []
  for number, (path, run) in enumerate(zip(workdirs, runs)):
    with _named(path):
      folders.append(Workdir(path, run.config, run.data))
      if finished := folders[number].result(run.config.train.steps):
        outcomes[number] = finished
  left = [number for number in range(len(runs)) if number not in outcomes]
  if not left:
    return [outcomes[number] for number in range(len(runs))]
  pack = Pack.of([runs[number] for number in left])
  with contextlib.ExitStack() as stack:
    records = []
    for number, run in zip(left, pack.runs):
      with _named(workdirs[number]):
        records.append(stack.enter_context(opened(run, folders[number])))
    for same, states in _by_step(_resumed(pack, records)):
      found = _PackLoop(pack.only(same), [records[i] for i in same], progress).run(states)
      outcomes |= {left[i]: outcome for i, outcome in zip(same, found)}
  return [outcomes[number] for number in range(len(runs))]


@contextlib.contextmanager
def _named(workdir: str | pathlib.Path) -> Iterator[None]:
  """Adds the name of a run's folder to errors that the block raises."""
  try:
    yield
  except lock.Held:
    raise
  except UserError as error:
    raise UserError(f'run {pathlib.Path(workdir).name}: {error}') from error


def _resumed(pack: Pack, records: Sequence[Record]) -> list[TrainState]:
  """Returns the state of each run, from its newest checkpoint, or at step 0 if it has none."""
  fresh = pack.start()
  _, masks = jax.device_get(pack.program.finalize(packed.stack(fresh), pack.numbers))
  found = []
  for number, (record, state) in enumerate(zip(records, fresh)):
    batches = record.setup.data.train_iterator(rng.data_seed(record.setup.config.seed))
    with _named(record.folder.path):
      restored = record.resume(state, tree.at_index(masks, number), batches)
    found.append(state if restored is None else restored)
  return found


def _by_step(states: Sequence[TrainState]) -> list[tuple[list[int], list[TrainState]]]:
  """Groups runs that have done equally many steps. Returns the indices and states of each group."""
  groups: dict[int, list[int]] = {}
  for number, state in enumerate(states):
    groups.setdefault(int(state.step), []).append(number)
  return [(group, [states[number] for number in group]) for group in groups.values()]


class _Kept(NamedTuple):
  """A run's best state, kept on the host until it is saved."""

  state: TrainState
  loss: float
  work: Work


class _Chunk(NamedTuple):
  """Steps that were dispatched together: the number of steps before them, and their metrics."""

  first: int
  metrics: list[PackedMetrics]

  @property
  def end(self) -> int:
    """The number of steps that are done after this chunk."""
    return self.first + len(self.metrics)


class _PackLoop:
  """Trains runs of one program that have done equally many steps, until their last step."""

  def __init__(self, pack: Pack, records: Sequence[Record], progress: bool) -> None:
    self.pack, self.records, self.progress = pack, records, progress
    self.run_of_all = pack.runs[0]  # what does not differ among the runs is read from it
    self.lost: dict[int, Diverged] = {}
    self.kept: dict[int, _Kept] = {}
    self.pending: _Chunk | None = None
    self.timer = _Timer()

  def run(self, states: Sequence[TrainState]) -> list[Outcome]:
    """Trains, logs, evaluates and saves, from the state of each run. Returns each run's outcome."""
    config, first = self.run_of_all.config, int(states[0].step)
    name, count = self.records[0].folder.path.name, len(states)
    with Stop() as stop, Console(self.progress, name, first, config.train.steps) as self.console:
      self.console.say(f'{count} runs in one program; {opening(self.run_of_all, name, first)}')
      for note in notes(self.run_of_all):
        self.console.say(note)
      for record in self.records:
        self.console.warn_once('plan', record.compare_plans(first))
      self._prepare(first)
      stacked, done = packed.stack(states), first
      self._check_scores(stacked, first)
      while done < config.train.steps and len(self.lost) < len(self.records):
        stacked, done = self._advance(stacked, done)
        # Read once: a signal that comes later waits for the next steps, which are saved.
        last, signum = done == config.train.steps, stop.signum
        if last or signum or done % config.train.eval_every == 0:
          self._collect()
          if last or done % config.train.eval_every == 0:
            self._evaluate(stacked, done)
          if last or signum:
            self._save(stacked, done)
          self.timer.start()
        if signum:
          leave(self.console, signum, done)
      return self._finish(stacked)

  def _prepare(self, first: int) -> None:
    """Compiles the steps and moves their inputs to the device."""
    self.steps = self.pack.compiled(first)
    data = self.run_of_all.data
    self.tokens, self.numbers = jax.device_put((data.tokens['train'], self.pack.numbers))
    self.starts = [data.starts(rng.data_seed(run.config.seed)) for run in self.pack.runs]
    masks = [jax.device_get(record.history.masks) for record in self.records]
    self.masks = jax.tree.map(lambda *leaves: np.stack(leaves), *masks)
    self.timer.start()

  def _advance(self, states: TrainState, done: int) -> tuple[TrainState, int]:
    """Dispatches the steps up to the next line of the log or the next evaluation, at most `CHUNK`.

    While the device runs them, the metrics of the chunk before them are collected.
    """
    train = self.run_of_all.config.train
    ends = [every - done % every + done for every in (CHUNK, train.log_every, train.eval_every)]
    end, metrics = min(*ends, train.steps), []
    starts_KxNxB = np.stack([starts(done, CHUNK) for starts in self.starts], axis=1)
    feed = Feed(self.tokens, self.numbers, *jax.device_put((np.int32(done), starts_KxNxB)))
    for step in range(done, end):
      states, found = self.steps[self.run_of_all.program.updates(step)](states, feed)
      metrics.append(found)
    self._collect()
    self.pending = _Chunk(done, metrics)
    self.console.step(end - done)
    return states, end

  def _collect(self) -> None:
    """Brings the metrics of the pending steps to the host, and logs them every `log_every` steps."""
    if self.pending is None:
      return
    chunk, self.pending = self.pending, None
    values = jax.device_get([metrics.values_NxM for metrics in chunk.metrics])
    self.timer.add(len(chunk.metrics))
    for step, (metrics, rows) in enumerate(zip(chunk.metrics, values), chunk.first + 1):
      for number, record in self._alive():
        with self._noting(number):
          record.add(step, dict(zip(metrics.names, rows[number].tolist())))
    train = self.run_of_all.config.train
    if chunk.end == train.steps or chunk.end % train.log_every == 0:
      self._log(chunk.end)

  def _log(self, step: int) -> None:
    milliseconds = self.timer.take()
    measured = {'packed_runs': len(self.records), 'packed_step_ms': milliseconds}
    losses = []
    for _, record in self._alive():
      losses.append(record.log(step, measured))
    self.console.status(f'{_span("training loss", losses)}, {milliseconds:.2f} ms a step')

  def _evaluate(self, states: TrainState, step: int) -> None:
    """Logs each run's validation loss and the changes of its masks, and keeps its best state."""
    self.console.status('evaluating')
    self._check_scores(states, step)
    found, masks = self._measure(states)
    moved = observe.connections_of_each(masks, self.masks, len(self.records))
    self.masks, better, losses = masks, [], []
    for number, record in self._alive():
      with self._noting(number):
        record.log_evaluation(step, found[number], moved[number])
        losses.append(found[number].values['val_loss'])
        best = self.kept[number].loss if number in self.kept else record.best.loss
        if record.at_final_density(step) and losses[-1] < best:
          better.append(number)
    if better:
      # A best state is evaluated and exported, but never trained on, so the rest of it is left out.
      read = states.replace(opt_state=None, control=None, signals={}, key=None)
      host = jax.device_get(read)
      for number in better:
        state, loss = tree.at_index(host, number), found[number].values['val_loss']
        self.kept[number] = _Kept(state, loss, self.records[number].history.work)
    self.console.say(f'step {step:,}: {_span("validation loss", losses)} of {len(losses)} runs')

  def _check_scores(self, states: TrainState, step: int) -> None:
    """Ends the runs with NaN or infinite scores of masks that every step chooses."""
    flags = jax.device_get(self.pack.program.non_finite(states))
    for number, record in self._alive():
      with self._noting(number):
        record.check_scores(tree.at_index(flags, number), step)

  def _measure(self, states: TrainState) -> tuple[list[Evaluated], Tree]:
    """Returns the evaluation of each run, and the masks of all runs."""
    params, masks = self.pack.program.finalize(states, self.numbers)
    values = evaluate_packed(self.run_of_all, params, states.model_state)
    host = jax.device_get(masks)
    each = [Evaluated(own, tree.at_index(host, i)) for i, own in enumerate(values)]
    return each, masks

  def _save(self, states: TrainState, step: int) -> None:
    """Saves each run's best state, and its newest state, from which the run can be continued."""
    host = jax.device_get(states.replace(key=None))
    for number, record in self._alive():
      self._offer(number)
      run = record.setup
      batches = run.data.train_iterator_at(rng.data_seed(run.config.seed), step)
      record.save(tree.at_index(host, number), batches)

  def _offer(self, number: int) -> None:
    """Writes a run's best state, if there is a better one than the last that was written."""
    if number in self.kept:
      record = self.records[number]
      record.best.offer(record.setup.program, *self.kept.pop(number))

  def _finish(self, states: TrainState) -> list[Outcome]:
    # A result reads the number of steps and the targets; weights and moments stay on the device.
    kept = states.replace(trainable=None, opt_state=None, ema=None, model_state=None, control=None)
    host, measured = jax.device_get(kept.replace(key=None, signals={})), None
    outcomes: dict[int, Outcome] = dict(self.lost)
    for number, record in self._alive():
      if record.evaluated is None:  # stopped after its last step, which it has logged
        measured = measured or self._measure(states)[0]
        record.evaluated = measured[number]
      outcomes[number] = record.finish(tree.at_index(host, number), record.evaluated)
    return [outcomes[number] for number in range(len(self.records))]

  def _alive(self) -> list[tuple[int, Record]]:
    """Returns the indices and records of the runs that have not diverged."""
    return [(i, record) for i, record in enumerate(self.records) if i not in self.lost]

  @contextlib.contextmanager
  def _noting(self, number: int) -> Iterator[None]:
    """Catches the divergence of one run: from then on that run is ignored, and the others go on."""
    try:
      yield
    except Diverged as error:
      self.lost[number] = error
      self._offer(number)  # as of a run alone, which writes it when it is found
      self.console.say(f'{self.records[number].folder.path.name}: {error}', always=True)


class _Timer:
  """Measures the time of a step as the time between finished chunks, while the device is never idle."""

  def __init__(self) -> None:
    self._seconds, self._steps = 0.0, 0

  def start(self) -> None:
    """Starts the clock for the next steps."""
    self._mark = time.perf_counter()

  def add(self, steps: int) -> None:
    """Adds `steps` that are finished now."""
    now = time.perf_counter()
    self._seconds, self._steps, self._mark = (
      self._seconds + now - self._mark,
      self._steps + steps,
      now,
    )

  def take(self) -> float:
    """Milliseconds a step since the last call."""
    milliseconds = 1e3 * self._seconds / self._steps
    self._seconds, self._steps = 0.0, 0
    return milliseconds


def _span(what: str, losses: Sequence[float]) -> str:
  """Returns the range of the runs' losses, in words."""
  if not losses:
    return f'no {what}'
  return f'{what} {min(losses):.4f} to {max(losses):.4f}'
