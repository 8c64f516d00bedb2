"""Reads finished runs as lines (see `results`), both of studies and of single workdirs.

The labels of a study distinguish its runs. Single runs have no labels: the config fields in which they
differ, and the fields that a table asks for, become their labels.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import TypedDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import JsonObject
from sparse_lm.report import results
from sparse_lm.runs import configs

# Fields that do not become labels: tables average over seeds, and the others concern logging.
LOGGING = ('seed', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')


def read(paths: Iterable[str | pathlib.Path], asked: Sequence[str] = ()) -> list[results.Line]:
  """Returns the lines of all paths in order.

  Args:
    paths: each a runs.jsonl of a study, the workdir of a run, or a result.json.
    asked: labels and config fields, such as 'weight.sparsity', that become labels of every line.

  Raises:
    UserError: a path holds no finished run, or a name in `asked` is neither a label nor a field.
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
  """The fields of a result.json that tables use."""

  config: _Config
  env: dict[str, object]
  metrics: dict[str, object]


def _line(path: pathlib.Path) -> results.Line:
  """Returns the line of a workdir or a result.json, without labels."""
  from sparse_lm.runs.workdir import read_json

  file = path / 'result.json' if path.is_dir() else path
  if not file.is_file():
    raise UserError(
      f'{path} holds no finished run (no result.json); valid: a workdir that finished'
    )
  result = read_json(file, _Result)
  return result | {'run': str(file.parent), 'labels': {}, 'seed': result['config']['seed']}


def _fields(lines: Iterable[results.Line]) -> list[str]:
  """Returns the config fields of all lines in order of first appearance."""
  return list(
    dict.fromkeys(name for line in lines for name in configs.flat(line.get('config') or {}))
  )


def _differing(lines: Sequence[results.Line]) -> list[str]:
  """Returns the config fields whose values differ among the configs that have them."""
  found = [configs.flat(line.get('config') or {}) for line in lines]
  differing = []
  for name in _fields(lines):
    values = [config[name] for config in found if name in config]
    if name not in LOGGING and any(value != values[0] for value in values):
      differing.append(name)
  return differing


def _values(line: results.Line, names: Iterable[str]) -> JsonObject:
  """Returns the values of the fields `names` that the config of the line has."""
  fields = configs.flat(line.get('config') or {})
  return {name: fields[name] for name in names if name in fields}
