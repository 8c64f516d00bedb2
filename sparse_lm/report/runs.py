"""Finished runs as lines (see `lines`): of studies, and single ones from their workdirs.

A study says in its labels what each run is. A run trained by hand has its config for that: the fields
in which the given runs differ, and those that a table asks for, become labels.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import TypedDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import JsonObject
from sparse_lm.report import results
from sparse_lm.runs import configs

# Fields that don't tell runs apart: means are taken over seeds, and the others only say what is logged.
LOGGING = ('seed', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')


def read(paths: Iterable[str | pathlib.Path], asked: Sequence[str] = ()) -> list[results.Line]:
  """The lines of all paths in order.

  Args:
    paths: of a study's runs.jsonl, a run's workdir, or its result.json.
    asked: labels and config fields, such as 'weight.sparsity', that every line is to have as labels.

  Raises:
    UserError: a path holds no finished run, or nothing is called as one of `asked`.
  """
  found, single = [], []
  for path in map(pathlib.Path, paths):
    if path.is_dir() or path.suffix == '.json':
      found.append(_line(path))
      single.append(found[-1])
    else:
      found += results.read([path])
  known = [*results.label_names(found), *_fields(found)]
  for name in asked:
    if name not in known:
      raise unknown('label', name, known)
  for line in single:
    line['labels'] |= _values(line, _differing(found) or ['weight.name'])
  for line in found:
    line['labels'] |= _values(line, [name for name in asked if name not in line['labels']])
  return list({(line.get('study'), line['run']): line for line in found}.values())


class _Config(TypedDict):
  seed: int


class _Result(TypedDict):
  """What a table needs of a result.json."""

  config: _Config
  env: dict[str, object]
  metrics: dict[str, object]


def _line(path: pathlib.Path) -> results.Line:
  """The line of a workdir or of a result.json, without labels."""
  from sparse_lm.runs.workdir import read_json

  file = path / 'result.json' if path.is_dir() else path
  if not file.is_file():
    raise UserError(
      f'{path} holds no finished run (no result.json); valid: a workdir that finished'
    )
  result = read_json(file, _Result)
  return result | {'run': str(file.parent), 'labels': {}, 'seed': result['config']['seed']}


def _fields(lines: Iterable[results.Line]) -> list[str]:
  """Every config field of any line, in order of first appearance."""
  return list(
    dict.fromkeys(name for line in lines for name in configs.flat(line.get('config') or {}))
  )


def _differing(lines: Sequence[results.Line]) -> list[str]:
  """The fields that two configs have with different values; one that a method lacks is no difference."""
  found = [configs.flat(line.get('config') or {}) for line in lines]
  differing = []
  for name in _fields(lines):
    values = [config[name] for config in found if name in config]
    if name not in LOGGING and any(value != values[0] for value in values):
      differing.append(name)
  return differing


def _values(line: results.Line, names: Iterable[str]) -> JsonObject:
  """The config's values of the fields `names`, as far as it has them."""
  fields = configs.flat(line.get('config') or {})
  return {name: fields[name] for name in names if name in fields}
