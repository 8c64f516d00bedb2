"""A study on disk: the runs that it plans, the lines of those that have finished, and its report."""

import collections
import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping

from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import loading
from experiments.sweep import Run
from sparse_lm.core.errors import Diverged, UserError, unknown, writing
from sparse_lm.core.records import JsonObject
from sparse_lm.report import results
from sparse_lm.runs import lock

# Trains the runs of a pack, given their folders by id. Returns each run's result, or its error if the
# run diverged.
TrainPack = Callable[[Mapping[str, pathlib.Path]], list[JsonObject | Diverged]]


@dataclasses.dataclass
class Study:
  """A study's module and the folder of its results.

  Attributes:
    name: the name of its module.
    module: the module, which defines `runs` and `report`.
    folder: `<results>/<name>`. It holds `runs.jsonl`, tables, figures and `runs/<run id>`.
    runs: the planned runs by id, in the order of the table.
    path: the path of the study's file as given; '' for a study of this package.
  """

  name: str
  module: types.ModuleType
  folder: pathlib.Path
  runs: dict[str, Run]
  path: str = ''

  @classmethod
  def load(cls, study: str, results_folder: str | pathlib.Path = 'results') -> 'Study':
    """Loads a study by its name in this package or by the path of its file.

    Raises UserError if there is no such study, if its file fails, or if it plans one run twice.
    """
    study = loading.shortened(study)
    module, planned = loading.load(study)
    path = study if loading.is_path(study) else ''
    name = pathlib.Path(study).stem if path else study
    runs: dict[str, Run] = {}
    for run in planned:
      if run.id(name) in runs:
        raise UserError(f'study {study} plans the run {run.id(name)} twice; valid: each run once')
      runs[run.id(name)] = run
    root = pathlib.Path(os.path.expanduser(results_folder))
    return cls(name, module, root / name, runs, path)

  @property
  def file(self) -> pathlib.Path:
    """The file with one line for each finished run."""
    return self.folder / 'runs.jsonl'

  @property
  def argument(self) -> str:
    """The study as `python -m experiments.run` takes it, quoted for a shell."""
    return shlex.quote(self.path or self.name)

  def finished(self) -> dict[str, results.Line]:
    """Returns the lines of the planned runs that have finished, by run id, in the study's order."""
    lines = results.read_file(self.file) if self.file.exists() else []
    by_id = {line['run']: line for line in lines}
    return {run_id: by_id[run_id] for run_id in self.runs if run_id in by_id}

  def shard(self, index: int = 0, num_shards: int = 1) -> dict[str, Run]:
    """Returns every `num_shards`-th run, starting at `index`. Raises UserError for a bad index."""
    if num_shards < 1 or not 0 <= index < num_shards:
      raise UserError(
        f'no shard --index={index} of --num_shards={num_shards}; valid: 0 <= index < num_shards'
      )
    # Shards divide all runs, because the set of missing runs changes while other shards work.
    return dict(list(self.runs.items())[index::num_shards])

  def workdir(self, run_id: str) -> pathlib.Path:
    """The folder of a run."""
    return self.folder / 'runs' / run_id

  def command(self, run_id: str) -> str:
    """The shell command that reproduces a run."""
    run = self.runs[run_id]
    if run.execute is None:
      return run.command(self.workdir(run_id))
    arguments = shlex.join([f'--results={self.folder.parent}', f'--only={run_id}'])
    return f'python -m experiments.run {self.argument} {arguments}  # {run.arguments}'

  def only(self, run_id: str) -> dict[str, Run]:
    """One run. Raises UserError if the study plans no run of this id."""
    if run_id not in self.runs:
      raise unknown(f'run of {self.name}', run_id, self.runs)
    return {run_id: self.runs[run_id]}

  def missing(self, runs: dict[str, Run], again: bool = False) -> dict[str, Run]:
    """Returns the runs without a line; with `again`, also the runs that diverged."""
    lines = self.finished()
    return {
      run_id: run
      for run_id, run in runs.items()
      if run_id not in lines or (again and results.has_diverged(lines[run_id]))
    }

  def configs(self, runs: dict[str, Run]) -> dict[str, ConfigDict]:
    """Loads the configs of runs, by id. Raises UserError, which names the run, if one is wrong."""
    loaded = {}
    for run_id, run in runs.items():
      with _named([run_id]):
        loaded[run_id] = _load(run)
    return loaded

  def train(self, runs: dict[str, Run], again: bool = False, pack: int | None = None) -> int:
    """Executes every missing run that no other process works on, and appends its line.

    Args:
      runs: the runs to consider, by id.
      again: also execute runs that diverged before.
      pack: how many runs are trained as one program, see `packing.plan`; `None` = each run alone.

    Returns:
      How many runs were skipped because other processes work on them.

    Raises:
      UserError: a config is wrong, before the first run starts; or a run failed (the lines of the
        finished runs are kept).
    """
    missing, skipped = self.missing(runs, again), 0
    configs = self.configs(missing)
    jobs = collections.deque(_jobs(missing, configs, pack))
    forward = True
    finished = len(runs) - len(missing)
    bar = tqdm(
      total=len(runs),
      initial=finished,
      disable=None if missing else True,  # None: only where stderr is no terminal
      unit='run',
      dynamic_ncols=True,
      file=sys.stderr,
    )
    with bar:
      while jobs:
        job, train_pack = jobs.popleft() if forward else jobs.pop()
        first, *others = job
        name = f'{first} and {len(others)} more' if others else first
        bar.set_description(name)
        try:
          with contextlib.ExitStack() as stack:
            taken = [run_id for run_id in job if self._take(run_id, stack)]
            skipped += len(job) - len(taken)
            if not taken:
              # Another process works here. The runs at the other end have other methods, so the two
              # processes compile different programs.
              forward = not forward
            # Another process may have finished some of them meanwhile.
            todo = self.missing({run_id: job[run_id] for run_id in taken}, again)
            if todo and bar.disable:
              print(f'run {finished + 1}/{len(runs)}: {name}', file=sys.stderr, flush=True)
            for run_id, outcome in self._outcomes(todo, configs, train_pack).items():
              results.append(self.file, self._head(run_id, configs[run_id].seed) | outcome)
        except lock.Held:
          skipped += len(taken)
        bar.update(len(job))
        finished += len(job)
    return skipped

  def _take(self, run_id: str, stack: contextlib.ExitStack) -> bool:
    """Locks a run. Returns False if another process works on it."""
    with writing(self.workdir(run_id)):
      self.workdir(run_id).mkdir(parents=True, exist_ok=True)
    try:
      # Training takes the lock of the workdir itself, so this is another one.
      stack.enter_context(lock.held(self.workdir(run_id) / 'study.lock', f'run {run_id}'))
    except lock.Held:
      return False
    return True

  def _head(self, run_id: str, seed: int) -> JsonObject:
    """Returns the fields of a run's line that are known before the run."""
    head: JsonObject = {
      'study': self.name,
      'run': run_id,
      'labels': self.runs[run_id].labels,
      'seed': seed,
      'command': self.command(run_id),
    }
    return head | ({'study_file': self.path} if self.path else {})

  def _outcomes(
    self, job: dict[str, Run], configs: Mapping[str, ConfigDict], train_pack: TrainPack | None
  ) -> dict[str, JsonObject]:
    """Executes the runs of a job, given their configs; several runs are trained by `train_pack`.

    Raises UserError if a run fails for another reason than divergence.
    """
    workdirs = {run_id: self.workdir(run_id) for run_id in job}
    try:
      with _named(job):
        if len(job) > 1:
          found = train_pack(workdirs)
        else:
          found = [
            run.execute(run, workdirs[run_id])
            if run.execute
            else _train(configs[run_id], workdirs[run_id])
            for run_id, run in job.items()
          ]
    except Diverged as error:
      found = [error]
    return {
      run_id: results.diverged(str(outcome))
      if isinstance(outcome, Diverged)
      else _checked(run_id, outcome)
      for run_id, outcome in zip(job, found)
    }

  def report(self) -> str:
    """Returns the report of the finished runs, with a note on missing and diverged runs."""
    finished = self.finished()
    lacking = len(self.runs) - len(finished)
    note = f'{lacking} of {len(self.runs)} runs are missing'
    lost = [run_id for run_id, line in finished.items() if results.has_diverged(line)]
    if len(lost) == len(finished):
      return f'{note}, {len(lost)} diverged: no table yet'
    try:
      shown = self.module.report(results.with_diverged(list(finished.values())), self.folder)
    except UserError as error:
      if not lacking:
        raise
      return f'{note}: no table yet ({error})'  # such as a baseline that another shard trains
    if lost:
      again = (
        f'python -m experiments.run {self.argument} --results={self.folder.parent} --only=RUN_ID'
      )
      shown += f'\nDiverged: {", ".join(lost)}; to train one again: {again}\n'
    return f'{shown}\n{note}: the table shows the finished runs\n' if lacking else shown


def reproduce(lines: list[results.Line], folder: pathlib.Path) -> str:
  """The command that repeats the study of these lines, for the note below a table.

  Args:
    lines: of the study.
    folder: the study's folder, whose name is that of the study.
  """
  study = lines[-1].get('study_file', folder.name)
  return f'python -m experiments.run {shlex.quote(study)}'


def _checked(run_id: str, result: JsonObject) -> JsonObject:
  if not isinstance(result, dict) or not result.get('metrics'):
    raise UserError(
      f'run {run_id}: execute returns no metrics; valid: a dict whose "metrics" hold numbers by name'
    )
  return result


@contextlib.contextmanager
def _named(run_ids: Collection[str]) -> Iterator[None]:
  """Names the run, or the number of runs, in a `UserError` that is raised in the block.

  A run that diverged or is locked is no error of the study, so these errors stay as they are.
  """
  try:
    yield
  except (Diverged, lock.Held):
    raise
  except UserError as error:
    whose = f'run {next(iter(run_ids))}' if len(run_ids) == 1 else f'a pack of {len(run_ids)} runs'
    raise UserError(f'{whose}: {error}') from error


def _load(run: Run) -> ConfigDict:
  """Loads and validates the run's config. Imported here, because `--list` needs no JAX."""
  from sparse_lm.runs import configs as config

  return config.load(run.config, run.overrides)


def _jobs(
  runs: dict[str, Run], configs: Mapping[str, ConfigDict], pack: int | None
) -> list[tuple[dict[str, Run], TrainPack | None]]:
  """Returns groups of runs, each with the function that trains the group as a pack, or `None`.

  Without `pack`, each run is a group of its own.

  Raises UserError if a config is wrong.
  """
  if pack is None:
    _check({run_id: configs[run_id] for run_id, run in runs.items() if run.execute is None})
    return [({run_id: run}, None) for run_id, run in runs.items()]
  from experiments import packing

  return [(dict(job.runs), job.train) for job in packing.plan(runs, configs, pack)]


def _check(configs: Mapping[str, ConfigDict]) -> None:
  """Sets up one run of each config, whatever its seed. Raises UserError if a config is wrong."""
  from sparse_lm.runs.setup import setup

  seen = []
  for run_id, config in configs.items():
    what = config.to_dict() | {'seed': 0}
    if what not in seen:
      seen.append(what)
      with _named([run_id]):
        setup(config)


def _train(config: ConfigDict, workdir: pathlib.Path) -> JsonObject:
  """Trains or continues a run and returns its result.json. Imports JAX here, as `_load` does."""
  from sparse_lm.runs import runtime

  runtime.prepare()
  from sparse_lm.runs.loop import train

  return train(config, str(workdir))
