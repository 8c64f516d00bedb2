"""The runs of a study, as data: sweeps are lists of override dicts, and a run is a config with one.

  methods = chain(fixed({'weight.name': 'rigl'}), fixed({'weight.name': 'set'}))
  product(methods, grid('weight.sparsity', (0.8, 0.9)), grid('seed', range(3)))

is the overrides of twelve runs, the seed varying fastest.
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

# On every device, for studies whose captions say float32.
FLOAT32 = {'model.precision': 'float32'}
# Magnitudes applied straight-through, at the final sparsity from the first step.
STE = {
  'weight.name': 'magnitude',
  'weight.apply': 'straight_through',
  'weight.schedule': 'at_once',
  'weight.start': 0.0,
}


def fixed(overrides: Mapping[str, FieldValue] | None = None, /, **fields: FieldValue) -> Sweep:
  """One set of overrides: `fixed({'weight.name': 'rigl'}, seed=1)`."""
  return [_merge((overrides or {}, fields))]


def grid(field: str, values: Iterable[FieldValue | np.generic]) -> Sweep:
  """One set of overrides for each value."""
  # NumPy's scalars print and hash unlike the numbers that they are.
  return [{field: v.item() if isinstance(v, np.generic) else v} for v in values]


def product(*sweeps: Sweep) -> Sweep:
  """Each with each, the last sweep varying fastest. Raises ValueError for a field set twice."""
  return [_merge(parts) for parts in itertools.product(*sweeps)]


def chain(*sweeps: Sweep) -> Sweep:
  """One after the other."""
  return [dict(overrides) for sweep in sweeps for overrides in sweep]


def together(*sweeps: Sweep) -> Sweep:
  """The first with the first, the second with the second, and so on.

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
  """One run of a study, which trains a model unless the study says what else is done.

  Attributes:
    config: path of its config file, such as 'configs/tiny.py'.
    overrides: values by dotted field, such as {'weight.sparsity': 0.9, 'seed': 1}.
    labels: what tables and figures group by: strings, numbers, booleans or None, by name. The seed
      is no label (ValueError): means are taken over it.
    execute: what is done instead of training the config. It is handed the run and a folder of its own,
      and returns the `metrics` and, as far as there are any, the `config`, `env` and `data` of the run's
      line.
  """

  config: str
  overrides: Overrides
  labels: JsonObject
  execute: Callable[['Run', pathlib.Path], JsonObject] | None = None

  def __post_init__(self) -> None:
    if 'seed' in self.labels:
      raise ValueError('the seed of a run is an override, not a label: means are taken over it')

  def id(self, study: str) -> str:
    """A readable name and a hash of what is run; the same in every process.

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
    """Config and overrides as they are typed, quoted for a shell."""
    overrides = [f'--config.{field}={value}' for field, value in self.overrides.items()]
    return shlex.join([f'--config={self.config}', *overrides])

  def command(self, workdir: str | pathlib.Path) -> str:
    """The shell command that trains it in `workdir`."""
    return f'python -m sparse_lm.train {self.arguments} {shlex.join([f"--workdir={workdir}"])}'


def _word(name: str, value: Json) -> str:
  return value if isinstance(value, str) else f'{name}{value}'
