"""The results of a study: `runs.jsonl` holds one JSON line for each finished run.

A line has at least `run` (the id of the run), `labels` (what distinguishes the run besides its seed),
`seed` and `metrics` (numbers by name, each in its own unit). Lines that this module writes also have a
digest, which reveals later changes; lines that other programs write need no digest. The line of a run
that diverged has no metrics, but `failed: diverged` and the `message` of the error.
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
  """The fields of a line. Only lines that a study wrote must have `study`, `config` and `env`."""

  run: str
  labels: dict[str, object]
  seed: int
  metrics: dict[str, float | str | list | dict | None]
  study: NotRequired[str | None]
  config: NotRequired[dict[str, object] | None]
  env: NotRequired[dict[str, object] | None]


def read(paths: Iterable[str | pathlib.Path]) -> list[Line]:
  """Returns the lines of all files in order; a later line of a run replaces an earlier one.

  An incomplete line, from a process that was killed while it wrote, is skipped with a note on stderr.

  Raises:
    UserError: a file is missing or empty, or a line is not the line of a run, or was changed later.
  """
  found: dict[tuple[str | None, str], Line] = {}
  for path in map(pathlib.Path, paths):
    lines = read_file(path)
    if not lines:
      raise UserError(f'{path} holds no finished run; valid: the runs.jsonl of a study that ran')
    found |= {(line.get('study'), line['run']): line for line in lines}
  return with_diverged(list(found.values()))


def read_file(path: pathlib.Path) -> list[Line]:
  """Returns the lines of one file, which may be empty. A repeated run has several lines."""
  if not path.is_file():
    raise UserError(f'no results file {path}; valid: the runs.jsonl of a study that ran')
  lines = []
  for number, _, line, fault in records.read_lines(path, object):
    if fault:
      # An incomplete line may be in the middle of the file, because the next process appends after it.
      print(f'{path}:{number}: incomplete line, skipped ({fault})', file=sys.stderr)
      continue
    try:
      records.check(line, _Schema)
      line = records.unseal(line) if records.SEAL in line else line
    except ValueError as error:
      raise UserError(f"{path}:{number} is not a run's line: {error}") from None
    lines.append(line)
  return lines


def append(path: pathlib.Path, line: Line) -> None:
  """Appends a line under a lock. If that fails, the file is as before.

  Raises:
    UserError: the line cannot be written, as on a full disk.
  """
  content = json.dumps(records.seal(line)).encode() + b'\n'
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('ab+', buffering=0) as file, lock.waited_for(file.fileno()):
      size = os.fstat(file.fileno()).st_size
      if size and os.pread(file.fileno(), 1, size - 1) != b'\n':
        content = b'\n' + content  # after the incomplete line of a process that was killed
      try:
        written = file.write(content)
        if written < len(content):  # the disk is full: the second write raises the error
          file.write(content[written:])
        os.fsync(file.fileno())
      except OSError:
        os.ftruncate(file.fileno(), size)
        raise


def diverged(message: str) -> JsonObject:
  """Returns the fields that the line of a diverged run has instead of metrics."""
  return {'failed': 'diverged', 'message': message, 'metrics': {}}


def has_diverged(line: Line) -> bool:
  """True if the run of this line diverged."""
  return line.get('failed') == 'diverged'


def with_diverged(lines: Sequence[Line]) -> list[Line]:
  """Returns the lines with nan for all metrics of diverged runs, so that means over them are nan."""
  lost = dict.fromkeys(metric_names(lines), math.nan)
  return [line | {'metrics': lost} if has_diverged(line) else line for line in lines]


def label_names(lines: Iterable[Line]) -> list[str]:
  """Returns the names of all labels in order of first appearance."""
  return list(dict.fromkeys(name for line in lines for name in line['labels']))


def metric_names(lines: Iterable[Line]) -> list[str]:
  """Returns the names of all metrics in order of first appearance."""
  return list(dict.fromkeys(name for line in lines for name in line['metrics']))


def machines(lines: Iterable[Line]) -> list[str]:
  """Returns descriptions of the machines that made the runs: device or processor, cores, jax."""
  found = dict.fromkeys(machine(line['env']) for line in lines if line.get('env'))
  return list(found)


def machine(env: Mapping[str, Json]) -> str:
  """Describes the machine of a run, given the `env` of its line."""
  if env.get('device', 'cpu') != 'cpu':
    return f'{env["device"]}, jax {env.get("jax")}'
  instructions = env.get('instruction_set', 'instruction set not recorded')
  return f'{env.get("cores")} cores of {env.get("cpu")}, {instructions}, jax {env.get("jax")}'


def group(lines: Sequence[Line], names: Sequence[str]) -> dict[Key, list[Line]]:
  """Groups the lines by their values of the labels `names`, in order of first appearance.

  A missing label counts as `None`. The runs of a group differ only in their seeds.

  Raises:
    UserError: no line has such a label, or two runs of a group differ in another label or share a
      seed. A mean over the group would not be a mean over seeds.
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
  """Converts the value of a label to a hashable one: lists to tuples, objects to tuples of pairs."""
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
  """True if the line has all of `labels` with these values."""
  return all(line['labels'].get(name) == value for name, value in labels.items())


def by_seed(lines: Iterable[Line], metric: str) -> dict[int, float]:
  """Returns a metric by seed, for the lines that have it.

  nan and infinity are kept, so that a diverged run makes the mean nan instead of vanishing from it.

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
  """Raises UserError, which suggests the nearest name, if no line has the metric."""
  known = metric_names(lines)
  if metric not in known:
    raise unknown('metric', metric, known)
