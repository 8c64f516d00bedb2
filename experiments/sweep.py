"""The runs of a study as data. A run is a config file with overrides; a sweep is a list of overrides.

  methods = chain(fixed({'weight.name': 'rigl'}), fixed({'weight.name': 'set'}))
  product(methods, grid('weight.sparsity', (0.8, 0.9)), grid('seed', range(3)))

gives the overrides of twelve runs, in which the seed varies fastest.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from sparse_lm.core.ranges import FieldValue
from sparse_lm.core.records import Json, JsonObject

Overrides = dict[str, FieldValue]
Sweep = list[Overrides]

# For studies whose captions say float32, whatever the device.
FLOAT32 = {'model.precision': 'float32'}
# STE: magnitude masks with a straight-through gradient, at the final sparsity from the first step.
STE = {
  'weight.name': 'magnitude',
  'weight.apply': 'straight_through',
  'weight.schedule': 'at_once',
  'weight.start': 0.0,
}


def fixed(overrides: Mapping[str, FieldValue] | None = None, /, **fields: FieldValue) -> Sweep:
  """Makes a sweep with one set of overrides, such as `fixed({'weight.name': 'rigl'}, seed=1)`."""
  return [_merge((overrides or {}, fields))]


def grid(field: str, values: Iterable[FieldValue | np.generic]) -> Sweep:
  """Makes a sweep with one set of overrides for each value of a field."""
  # NumPy scalars are converted, because they print and hash differently from Python numbers.
  return [{field: v.item() if isinstance(v, np.generic) else v} for v in values]


def product(*sweeps: Sweep) -> Sweep:
  """Combines sweeps; the last one varies fastest. Raises ValueError for a field that is set twice."""
  return [_merge(parts) for parts in itertools.product(*sweeps)]


def chain(*sweeps: Sweep) -> Sweep:
  """Joins sweeps, one after the other."""
  return [dict(overrides) for sweep in sweeps for overrides in sweep]


def together(*sweeps: Sweep) -> Sweep:
  """Joins the first overrides of all sweeps, then the second ones, and so on, as `zip` does.

  Raises:
    ValueError: the sweeps differ in length, or a field is set twice.
  """
  return [_merge(parts) for parts in zip(*sweeps, strict=True)]


def _merge(parts: Iterable[Mapping[str, FieldValue]]) -> Overrides:
  merged: Overrides = {}
  for part in parts:
    if twice := merged.keys() & part.keys():
      raise ValueError(f'set twice: {", ".join(sorted(twice))}')
    merged |= part
  return merged


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a study. It trains a model unless it has a function `execute`.

  Attributes:
    config: path of the config file, such as 'configs/tiny.py'.
    overrides: values by dotted field, such as `{'weight.sparsity': 0.9, 'seed': 1}`.
    labels: strings, numbers, booleans or None by name, by which tables and figures group the runs. The
      seed must not be a label (ValueError), because means are taken over seeds.
    execute: a function that is called instead of training. It takes the run and the run's folder, and
      returns a dict with `metrics` and, if there are any, `config`, `env` and `data` for the run's line.
  """

  config: str
  overrides: Overrides
  labels: JsonObject
  execute: Callable[['Run', pathlib.Path], JsonObject] | None = None

  def __post_init__(self) -> None:
    if 'seed' in self.labels:
      raise ValueError(
        'the seed of a run is an override, not a label, because means are taken over seeds'
      )

  def id(self, study: str) -> str:
    """A readable name and a hash of the run, equal in every process.

    Two runs share an id only if study, config file, overrides and labels are the same.
    """
    content = [study, self.config, self.overrides, self.labels]
    canonical = json.dumps(content, sort_keys=True, separators=(',', ':'), allow_nan=False)
    words = [_word(name, value) for name, value in self.labels.items()]
    if 'seed' in self.overrides:
      words.append(f'seed{self.overrides["seed"]}')
    slug = re.sub(r'[^A-Za-z0-9._]+', '-', '-'.join(words))[:60].strip('-.') or 'run'
    return f'{slug}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}'

  @property
  def arguments(self) -> str:
    """Config and overrides as command-line arguments, quoted for a shell."""
    overrides = [f'--config.{field}={value}' for field, value in self.overrides.items()]
    return shlex.join([f'--config={self.config}', *overrides])

  def command(self, workdir: str | pathlib.Path) -> str:
    """The shell command that trains the run in `workdir`."""
    return f'python -m sparse_lm.train {self.arguments} {shlex.join([f"--workdir={workdir}"])}'


def _word(name: str, value: Json) -> str:
  return value if isinstance(value, str) else f'{name}{value}'
