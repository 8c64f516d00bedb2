"""A study's `runs.jsonl`: one JSON line per finished run, written, read and grouped.

A line holds at least `run` (its id), `labels` (what the run is, without its seed), `seed` and
`metrics` (numbers by name, each in its own unit). Lines that this module wrote also hold a digest, so
that a changed one is noticed; lines from elsewhere need none. The line of a run that diverged has no
metrics, but `failed: diverged` and the error's `message`.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, unknown, writing
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.runs import lock

Line = JsonObject
Key = tuple[Hashable, ...]


class _Schema(TypedDict):
  """What every line holds; one of an experiment also the name of its study."""

  run: str
  labels: dict[str, object]
  seed: int
  metrics: dict[str, float | str | list | dict | None]
  study: NotRequired[str | None]
  config: NotRequired[dict[str, object] | None]
  env: NotRequired[dict[str, object] | None]


def read(paths: Iterable[str | pathlib.Path]) -> list[Line]:
  """The lines of all files in order; a later line of the same run replaces the earlier one.

  Half a line, left by a process that was killed while writing, is left out and named on stderr.

  Raises:
    UserError: a file is missing, holds no line, or holds JSON that is not a run's or was changed.
  """
  found: dict[tuple[str | None, str], Line] = {}
  for path in map(pathlib.Path, paths):
    lines = read_file(path)
    if not lines:
      raise UserError(f'{path} holds no finished run; valid: the runs.jsonl of a study that ran')
    found |= {(line.get('study'), line['run']): line for line in lines}
  return with_diverged(list(found.values()))


def read_file(path: pathlib.Path) -> list[Line]:
  """The lines of one file, perhaps none; a run that was repeated has several."""
  if not path.is_file():
    raise UserError(f'no results file {path}; valid: the runs.jsonl of a study that ran')
  lines = []
  for number, _, line, fault in records.read_lines(path, object):
    if fault:
      # Also in the middle: the next process to append starts a new line behind the half one.
      print(f'{path}:{number}: half a line, left out ({fault})', file=sys.stderr)
      continue
    try:
      records.check(line, _Schema)
      line = records.unseal(line) if records.SEAL in line else line
    except ValueError as error:
      raise UserError(f"{path}:{number} is not a run's line: {error}") from None
    lines.append(line)
  return lines


def append(path: pathlib.Path, line: Line) -> None:
  """Adds a line while no other process does, all of it or nothing.

  Raises:
    UserError: it cannot be written, as on a full disk.
  """
  content = json.dumps(records.seal(line)).encode() + b'\n'
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab+', buffering=0) as file, lock.waited_for(file.fileno()):
      size = os.fstat(file.fileno()).st_size
      if size and os.pread(file.fileno(), 1, size - 1) != b'\n':
        content = b'\n' + content  # behind half a line, of a process that was killed
      try:
        written = file.write(content)
        if written < len(content):  # the disk was full within the line: says so itself
          file.write(content[written:])
        os.fsync(file.fileno())
      except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def diverged(message: str) -> JsonObject:
  """What the line of a run that diverged holds besides what names the run."""
  return {'failed': 'diverged', 'message': message, 'metrics': {}}


def has_diverged(line: Line) -> bool:
  """Whether a line is of a run that diverged."""
  return line.get('failed') == 'diverged'


def with_diverged(lines: Sequence[Line]) -> list[Line]:
  """The lines, with nan for every metric of a run that diverged: no mean may be taken without it."""
  lost = dict.fromkeys(metric_names(lines), math.nan)
  return [line | {'metrics': lost} if has_diverged(line) else line for line in lines]


def label_names(lines: Iterable[Line]) -> list[str]:
  """Every label in order of first appearance."""
  return list(dict.fromkeys(name for line in lines for name in line['labels']))


def metric_names(lines: Iterable[Line]) -> list[str]:
  """Every metric in order of first appearance."""
  return list(dict.fromkeys(name for line in lines for name in line['metrics']))


def machines(lines: Iterable[Line]) -> list[str]:
  """What the lines' runs were made on, each machine once: device or processor, cores and jax."""
  found = dict.fromkeys(machine(line['env']) for line in lines if line.get('env'))
  return list(found)


def machine(env: Mapping[str, Json]) -> str:
  """A run's `env` in a few words."""
  if env.get('device', 'cpu') != 'cpu':
    return f'{env["device"]}, jax {env.get("jax")}'
  instructions = env.get('instruction_set', 'instruction set not recorded')
  return f'{env.get("cores")} cores of {env.get("cpu")}, {instructions}, jax {env.get("jax")}'


def group(lines: Sequence[Line], names: Sequence[str]) -> dict[Key, list[Line]]:
  """The lines by their values of the labels `names`, in order of first appearance.

  A label that a line does not have counts as `None`. What remains within a group are seeds.

  Raises:
    UserError: no line has a label of that name, or a group holds runs that differ in another label
      or share a seed, so that a mean over it would not be one over seeds.
  """
  known = label_names(lines)
  for name in names:
    if name not in known:
      raise unknown('label', name, known)
  groups: dict[Key, list[Line]] = {}
  for line in lines:
    groups.setdefault(tuple(_hashable(line['labels'].get(name)) for name in names), []).append(line)
  for key, members in groups.items():
    _check_one_row(dict(zip(names, key)), members)
  return groups


def _hashable(value: Json) -> Hashable:
  """A label's value as part of a key: JSON's lists as tuples, its objects as tuples of pairs."""
  if isinstance(value, dict):
    return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
  return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _check_one_row(row: Mapping[str, Hashable], members: Sequence[Line]) -> None:
  first = members[0]['labels']
  for name in label_names(members):
    if other := [m for m in members if m['labels'].get(name) != first.get(name)]:
      values = f'{first.get(name)!r} and {other[0]["labels"].get(name)!r}'
      raise UserError(f'the row {row} holds runs of {name} {values}; add {name!r} to the rows')
  runs: dict[int, str] = {}
  for member in members:
    if member['seed'] in runs:
      both = f'{runs[member["seed"]]} and {member["run"]}'
      raise UserError(f'the row {row} holds two runs of seed {member["seed"]}: {both}')
    runs[member['seed']] = member['run']


def matches(line: Line, labels: Mapping[str, Json]) -> bool:
  """Whether a line has all of `labels`."""
  return all(line['labels'].get(name) == value for name, value in labels.items())


def by_seed(lines: Iterable[Line], metric: str) -> dict[int, float]:
  """A metric by seed, of the lines that have it.

  What is not finite stays: a run that diverged must not vanish from a mean.

  Raises:
    UserError: a value is not a number.
  """
  values = {}
  for line in lines:
    value = line['metrics'].get(metric)
    if value is None:
      continue
    if not isinstance(value, int | float):
      raise UserError(f'metric {metric!r} of run {line["run"]} is {value!r}, not a number')
    values[line['seed']] = float(value)
  return values


def check_metric(lines: Iterable[Line], metric: str) -> None:
  """Raises UserError, with the nearest name, for a metric that no line has."""
  known = metric_names(lines)
  if metric not in known:
    raise unknown('metric', metric, known)
