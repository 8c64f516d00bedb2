"""Plans which runs of a study are trained as one program (`--pack`), and trains these packs."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
from ml_collections import ConfigDict

from experiments.sweep import Run
from sparse_lm.core.errors import UserError
from sparse_lm.runs import packs, runtime
from sparse_lm.runs.pack_loop import Outcome, train_packed
from sparse_lm.runs.setup import Setup, setup

AUTO = 0  # `--pack` without a number: as many runs as fit the memory


@dataclasses.dataclass(frozen=True)
class Job:
  """A pack of runs, or one run that is executed alone.

  Attributes:
    runs: the runs by id.
    setups: the setups of a pack's runs, by id.
    alone_because: the reason why a run is not packed, in words; '' for a pack.
  """

  runs: Mapping[str, Run]
  setups: Mapping[str, Setup] = dataclasses.field(default_factory=dict)
  alone_because: str = ''

  @property
  def title(self) -> str:
    """A description of the job, in words."""
    if self.alone_because:
      return f'alone: {self.alone_because}'
    return f'a pack of {len(self.runs)} runs'

  def train(self, workdirs: Mapping[str, pathlib.Path]) -> list[Outcome]:
    """Trains runs of the pack. Returns the result.json of each, or its error if it diverged.

    Args:
      workdirs: the folders of the runs to train, by id.
    """
    setups = [self.setups[run_id] for run_id in workdirs]
    return train_packed(setups, list(map(str, workdirs.values())))


def plan(runs: Mapping[str, Run], configs: Mapping[str, ConfigDict], most: int) -> list[Job]:
  """Divides runs into packs and runs that are executed alone, in the order of execution.

  The steps of all packs are compiled, because compilation tells how much memory a pack needs.

  Args:
    runs: the runs by id.
    configs: their configs by id.
    most: the largest number of runs in a pack; `AUTO` = as many as fit the accelerator's memory.

  Raises:
    UserError: a config is wrong; a pack of `most` does not fit; or no two runs can be packed.
  """
  runtime.prepare()
  setups = _setups(runs, configs)
  if most == AUTO and jax.default_backend() == 'cpu':
    print(
      'no run is packed: on a CPU, packed runs take as long as runs one after the other; --pack=N packs '
      'them on a CPU too',
      file=sys.stderr,
    )
    return [Job({run_id: run}, alone_because='the device is a CPU') for run_id, run in runs.items()]
  found = packs.split(list(setups.values()), most or len(setups))
  names = list(setups)
  found = _fitted([[names[number] for number in part] for part in found], setups, most)
  if most != AUTO and len(setups) > 1 and all(len(part) == 1 for part in found):
    first, second = names[:2]
    raise UserError(
      f'--pack={most}: no two of the missing runs can be packed, such as {first} and {second}: '
      f'{packs.difference(setups[first], setups[second])}; valid: without --pack'
    )
  jobs = [_job(part, found, runs, setups) for part in found]
  jobs += [
    Job({run_id: run}, alone_because='it trains no model')
    for run_id, run in runs.items()
    if run.execute
  ]
  return jobs


def _setups(runs: Mapping[str, Run], configs: Mapping[str, ConfigDict]) -> dict[str, Setup]:
  """Sets up every run that trains a model. Raises UserError, naming the run, if a config is wrong."""
  found = {}
  for run_id, run in runs.items():
    if run.execute is None:
      try:
        found[run_id] = setup(configs[run_id])
      except UserError as error:
        raise UserError(f'run {run_id}: {error}') from error
  return found


def _job(
  part: Sequence[str],
  parts: Sequence[Sequence[str]],
  runs: Mapping[str, Run],
  setups: Mapping[str, Setup],
) -> Job:
  own = {run_id: runs[run_id] for run_id in part}
  if len(part) > 1:
    return Job(own, {run_id: setups[run_id] for run_id in part})
  run = setups[part[0]]
  if reason := packs.alone_because(run):
    return Job(own, alone_because=reason)
  sizes = [len(other) for other in parts if packs.difference(run, setups[other[0]]) is None]
  if len(sizes) == 1:
    reason = 'no other run has the same program'
  elif max(sizes) == 1:
    reason = 'no two runs of this program fit the memory together'
  else:
    reason = 'all packs of this program are full'
  return Job(own, alone_because=reason)


def _fitted(
  parts: Sequence[Sequence[str]], setups: Mapping[str, Setup], most: int
) -> list[Sequence[str]]:
  """Divides parts that do not fit the memory further, if `most` is `AUTO`.

  Raises UserError if a part does not fit and `most` is a number.
  """
  made = {tuple(part): packs.Pack.of([setups[i] for i in part]) for part in parts if len(part) > 1}
  packs.compile_packs(list(made.values()))
  found = []
  for part in parts:
    fits = packs.fitting(made[tuple(part)]) if len(part) > 1 else 1
    if fits >= len(part):
      found.append(part)
    elif most == AUTO:
      found += _fitted(packs.parts_of(part, max(fits, 1)), setups, most)
    else:
      valid = f'--pack={fits}' if fits > 1 else 'without --pack'
      raise UserError(
        f'--pack={most}: {len(part)} runs such as {part[0]} do not fit the '
        f'{runtime.memory() / 2**30:,.2f} GiB of memory together; valid: {valid}'
      )
  return found
