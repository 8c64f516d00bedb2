"""`python -m experiments.run NAME`: trains what a study still lacks, then prints its table.

A study is a module `experiments/<name>.py` with
  its question as docstring,
  `runs() -> list[Run]` (see `sweep`), in the order that its table is to have,
  `report(lines, folder) -> str`, which writes tables and figures and returns Markdown to print.
A run trains a model; one that does something else names a function for it, `Run(..., execute)`.

Several processes can work on one study: each takes runs that no other one is at. A run that diverges
is recorded as such, `report` gets nan for its metrics, and the others go on; it is trained again once
its line is removed from runs.jsonl, or with `--only=RUN_ID`.

`--pack` trains runs that differ in seed, sparsity, learning rate, weight decay or penalty as one
program on an accelerator, as many runs as fit its memory. `--pack=N` packs at most N runs, on a CPU too.
Every run keeps its own folder and line. `--dry_run` shows the packs.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import shlex
import sys
import types
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict
from tqdm import tqdm

import experiments
from experiments.sweep import Run
from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import Diverged, UserError, unknown, writing
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.report import results
from sparse_lm.runs import lock

# Trains several runs, given their folders by id. Returns each run's result, or its error if it diverged.
Together = Callable[[Mapping[str, pathlib.Path]], list[JsonObject | Diverged]]


def studies() -> dict[str, str]:
  """Every study and the first line of its docstring, read without importing it."""
  found = {}
  for module in pkgutil.iter_modules(experiments.__path__):
    source = importlib.util.find_spec(f'experiments.{module.name}').origin
    tree = ast.parse(pathlib.Path(source).read_text(encoding='utf-8'))
    if any(isinstance(node, ast.FunctionDef) and node.name == 'runs' for node in tree.body):
      found[module.name] = (ast.get_docstring(tree) or '').partition('\n')[0]
  return found


@dataclasses.dataclass
class Study:
  """A study's module and the folder of its results.

  Attributes:
    name: of the module.
    module: with `runs` and `report`.
    folder: `<results>/<name>`: `runs.jsonl`, tables, figures, `runs/<run id>`.
    runs: by id, in the study's order.
  """

  name: str
  module: types.ModuleType
  folder: pathlib.Path
  runs: dict[str, Run]

  @classmethod
  def load(cls, name: str, results_folder: str | pathlib.Path = 'results') -> 'Study':
    """Raises UserError for a name that is no study's, or a study that plans one run twice."""
    if name not in studies():
      raise unknown('study', name, studies())
    module = importlib.import_module(f'experiments.{name}')
    runs: dict[str, Run] = {}
    for run in module.runs():
      if run.id(name) in runs:
        raise UserError(f'study {name} plans the run {run.id(name)} twice')
      runs[run.id(name)] = run
    root = pathlib.Path(os.path.expanduser(results_folder))
    return cls(name, module, root / name, runs)

  @property
  def file(self) -> pathlib.Path:
    """Of the lines."""
    return self.folder / 'runs.jsonl'

  def finished(self) -> dict[str, results.Line]:
    """The lines by run id, in the study's order; lines of runs that it no longer plans are left."""
    lines = results.read_file(self.file) if self.file.exists() else []
    by_id = {line['run']: line for line in lines}
    return {run_id: by_id[run_id] for run_id in self.runs if run_id in by_id}

  def shard(self, index: int = 0, num_shards: int = 1) -> dict[str, Run]:
    """Every `num_shards`-th run from the `index`-th on. Raises UserError for a bad index."""
    if num_shards < 1 or not 0 <= index < num_shards:
      raise UserError(
        f'no shard --index={index} of --num_shards={num_shards}; valid: 0 <= index < num_shards'
      )
    # Of all runs, not of the missing ones: those change while other shards work.
    return dict(list(self.runs.items())[index::num_shards])

  def workdir(self, run_id: str) -> pathlib.Path:
    """Of a run."""
    return self.folder / 'runs' / run_id

  def command(self, run_id: str) -> str:
    """What reproduces a run in a shell."""
    run = self.runs[run_id]
    if run.execute is None:
      return run.command(self.workdir(run_id))
    arguments = shlex.join([f'--results={self.folder.parent}', f'--only={run_id}'])
    return f'python -m experiments.run {self.name} {arguments}  # {run.arguments}'

  def only(self, run_id: str) -> dict[str, Run]:
    """One run. Raises UserError where the study plans none of this id."""
    if run_id not in self.runs:
      raise unknown(f'run of {self.name}', run_id, self.runs)
    return {run_id: self.runs[run_id]}

  def missing(self, runs: dict[str, Run], again: bool = False) -> dict[str, Run]:
    """The runs without a line; `again`: also those whose line says that they diverged."""
    lines = self.finished()
    return {
      run_id: run
      for run_id, run in runs.items()
      if run_id not in lines or (again and results.has_diverged(lines[run_id]))
    }

  def train(self, runs: dict[str, Run], again: bool = False, pack: int | None = None) -> int:
    """Runs what is missing (see there) and no other process is at, and appends its line.

    Args:
      pack: see `packing.plan`; `None` = each run is executed alone.

    Returns:
      How many runs were left to other processes.

    Raises:
      UserError: a config is wrong, before the first run starts; or a run failed (the lines of the
        finished ones are kept).
    """
    missing, left = self.missing(runs, again), 0
    seeds = {run_id: _load(run).seed for run_id, run in missing.items()}
    jobs = _jobs(missing, pack)
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
      for job, together in jobs:
        first, *others = job
        name = f'{first} and {len(others)} more' if others else first
        bar.set_description(name)
        if bar.disable:
          print(f'run {finished + 1}/{len(runs)}: {name}', file=sys.stderr, flush=True)
        try:
          with contextlib.ExitStack() as stack:
            taken = [run_id for run_id in job if self._take(run_id, stack)]
            left += len(job) - len(taken)
            # Another process may have done some meanwhile.
            todo = self.missing({run_id: job[run_id] for run_id in taken}, again)
            for run_id, outcome in self._outcomes(todo, together).items():
              results.append(self.file, self._head(run_id, seeds[run_id]) | outcome)
        except lock.Held:
          left += len(taken)
        bar.update(len(job))
        finished += len(job)
    return left

  def _take(self, run_id: str, stack: contextlib.ExitStack) -> bool:
    """Locks a run, and returns whether no other process is at it."""
    with writing(self.workdir(run_id)):
      self.workdir(run_id).mkdir(parents=True, exist_ok=True)
    try:
      # Not the lock of the workdir itself, which training takes.
      stack.enter_context(lock.held(self.workdir(run_id) / 'study.lock', f'run {run_id}'))
    except lock.Held:
      return False
    return True

  def _head(self, run_id: str, seed: int) -> JsonObject:
    """What a run's line holds besides its outcome."""
    return {
      'study': self.name,
      'run': run_id,
      'labels': self.runs[run_id].labels,
      'seed': seed,
      'command': self.command(run_id),
    }

  def _outcomes(self, job: dict[str, Run], together: Together | None) -> dict[str, JsonObject]:
    """Executes runs, several `together`.

    Raises UserError where one fails for another reason than that it diverges.
    """
    workdirs = {run_id: self.workdir(run_id) for run_id in job}
    try:
      if len(job) > 1:
        found = together(workdirs)
      else:
        found = [(run.execute or _train)(run, workdirs[run_id]) for run_id, run in job.items()]
    except Diverged as error:
      found = [error]
    except lock.Held:
      raise
    except UserError as error:
      whose = f'run {next(iter(job))}' if len(job) == 1 else f'a pack of {len(job)} runs'
      raise UserError(f'{whose}: {error}') from error
    return {
      run_id: results.diverged(str(outcome))
      if isinstance(outcome, Diverged)
      else _checked(run_id, outcome)
      for run_id, outcome in zip(job, found)
    }

  def report(self) -> str:
    """Tables and figures of what has finished, and how much of the study that is."""
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
      again = f'python -m experiments.run {self.name} --results={self.folder.parent} --only=RUN_ID'
      shown += f'\nDiverged: {", ".join(lost)}; to train one again: {again}\n'
    return f'{shown}\n{note}: the table is of the others\n' if lacking else shown


def _checked(run_id: str, result: JsonObject) -> JsonObject:
  if not result.get('metrics'):
    raise ValueError(f'execute returned no metrics for run {run_id}')
  return result


def _load(run: Run) -> ConfigDict:
  """The run's config, which validates it. Imported here: `--list` needs no JAX."""
  from sparse_lm.runs import configs as config

  return config.load(run.config, run.overrides)


def _jobs(runs: dict[str, Run], pack: int | None) -> list[tuple[dict[str, Run], Together | None]]:
  """The groups of runs that are executed together, each with the function that trains it as a pack.

  Raises UserError for a config that is wrong.
  """
  if pack is None:
    _check({run_id: run for run_id, run in runs.items() if run.execute is None})
    return [({run_id: run}, None) for run_id, run in runs.items()]
  from experiments import packing

  return [(dict(job.runs), job.train) for job in packing.plan(runs, pack)]


def _check(runs: dict[str, Run]) -> None:
  """Sets up every run that differs from the others in more than its seed. Raises UserError."""
  from sparse_lm.runs.setup import setup

  seen = []
  for run_id, run in runs.items():
    what = (run.config, run.overrides | {'seed': 0})
    if what not in seen:
      seen.append(what)
      try:
        setup(_load(run))
      except UserError as error:
        raise UserError(f'run {run_id}: {error}') from error


def _train(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Trains or continues a run and returns its result.json. Imported here, as in `_load`."""
  from sparse_lm.runs import runtime

  runtime.prepare()
  from sparse_lm.runs.loop import train

  return train(_load(run), str(workdir))


@one_line
def main() -> None:
  """Lists studies, lists what one lacks, or runs it and prints its table."""
  arguments = _arguments()
  if arguments.list:
    for name, question in studies().items():
      print(f'{name}: {question}')
    return
  study = Study.load(arguments.name, arguments.results)
  again = bool(arguments.only)
  runs = study.only(arguments.only) if again else study.shard(arguments.index, arguments.num_shards)
  if arguments.dry_run:
    _list_missing(study, runs, study.missing(runs, again), arguments.pack)
    return
  if left := study.train(runs, again, arguments.pack):
    print(f'{left} runs are in the hands of other processes', file=sys.stderr)
  print(study.report())


def _list_missing(
  study: Study, runs: dict[str, Run], missing: dict[str, Run], pack: int | None
) -> None:
  """Prints the commands of the missing runs, in packs where runs are packed."""
  print(f'# {len(runs) - len(missing)} of {len(runs)} runs are finished; missing:')
  if pack is None:
    for run_id in missing:
      print(study.command(run_id))
    return
  from experiments import packing

  for job in packing.plan(missing, pack):
    print(f'# {job.title}')
    for run_id in job.runs:
      print(study.command(run_id))


def _arguments() -> argparse.Namespace:
  parser = Parser('python -m experiments.run')
  parser.add_argument('name', nargs='?', help='a study')
  parser.add_argument(
    '--results', type=local_path, default='results', help="folder of all studies' results"
  )
  parser.add_argument('--only', metavar='RUN_ID', help='one run, also if it has diverged before')
  parser.add_argument('--list', action='store_true', help='list the studies')
  parser.add_argument('--dry_run', action='store_true', help='print what is missing')
  parser.add_argument(
    '--pack',
    nargs='?',
    const=0,
    type=Range(int, '[2, 2^31)'),
    metavar='N',
    help='train at most N runs as one program; without N as many as fit the memory of an accelerator',
  )
  parser.add_argument('--index', type=Range(int, '[0, 2^31)'), default=0, help='of this shard')
  parser.add_argument(
    '--num_shards', type=Range(int, '[1, 2^31)'), default=1, help='processes that share the study'
  )
  arguments = parser.parse_args()
  if not arguments.name and not arguments.list:
    parser.error('name a study, or ask for --list')
  return arguments


if __name__ == '__main__':
  main()
