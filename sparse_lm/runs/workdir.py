"""The folder of a run.

config.json, env.json, data.json, tokenizer.json, metrics.jsonl, TensorBoard events, checkpoints and,
once it has finished, result.json.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TypedDict

from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, require, writing
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.core.version import WRITTEN_BY
from sparse_lm.data.corpus import Card
from sparse_lm.data.pipeline import Data
from sparse_lm.runs import configs, lock
from sparse_lm.runs.environment import environment
from sparse_lm.runs.run_folder import CHECKPOINTS, CONFIG, LOG, read_config, with_format

# What may differ when a run is continued: its length, and what it writes on the way.
FREE = ('train.steps', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')


class _Metrics(TypedDict):
  """Numbers by name; what was not measured is `None`."""

  steps: int


class Result(TypedDict):
  """What result.json holds."""

  config: dict[str, object]
  env: dict[str, object]
  data: Card
  evaluation: dict[str, dict[str, object]]
  causal: dict[str, bool]
  metrics: _Metrics


def write_json(path: pathlib.Path, values: JsonObject) -> None:
  """Replaces `path` as a whole, sealed by a digest of its content: a reader never sees half of it."""
  _replace(path, records.sealed(values).encode())


def _replace(path: pathlib.Path, text: bytes) -> None:
  with writing(path):
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_bytes(text)
    os.replace(temporary, path)


def read_json(path: pathlib.Path, schema: records.Schema = records.OBJECT) -> Json:
  """What `write_json` wrote, checked against `schema`; `core.records.read` documents the `UserError`."""
  return records.read(path, schema)


def read_log(path: pathlib.Path) -> list[tuple[bytes, dict[str, float]]]:
  """Text and numbers of the intact lines of a metrics.jsonl, each with its `step`.

  One line on stderr says which are damaged and left out.
  """
  intact, faults = [], []
  for number, text, values, fault in records.read_lines(path, dict[str, float | None]):
    if not fault and not isinstance(values.get('step'), int):
      fault = "it has no whole number 'step'"
    if fault:
      faults.append(f'line {number} ({fault})')
    else:
      intact.append((text.rstrip(b'\n') + b'\n', values))
  if faults:
    print(f'{path}: {len(faults)} damaged lines are left out, first {faults[0]}', file=sys.stderr)
  return intact


def check_text(folder: pathlib.Path, data: Data, field: str) -> None:
  """Raises UserError, naming `field`, where a workdir's run was on other text or tokens."""
  card = read_json(folder / 'data.json', Card)
  if card['sha256'] != data.card['sha256']:
    raise UserError(
      f'{field}={folder} holds a run on other text (its sha256 in data.json differs); valid: the same '
      'text, or another workdir'
    )
  if records.digest(read_json(folder / 'tokenizer.json')) != data.tokenizer.digest:
    raise UserError(
      f'{field}={folder} holds a run with another tokenizer (its tokenizer.json differs); valid: the '
      'same tokenizer, or another workdir'
    )


def fixed(config: JsonObject) -> JsonObject:
  """The fields of a config.json, by dotted name, that are the same for the whole life of a run."""
  free = (*FREE, WRITTEN_BY)  # another version may continue a run
  return {field: value for field, value in configs.flat(config).items() if field not in free}


def check_new(path: str, field: str) -> None:
  """Raises UserError, naming `field`, where `path` is there already and no empty folder, or where no
  folder can be made or written at it."""
  require(path != '', field, path, 'a new folder')
  folder = pathlib.Path(os.path.expanduser(path)).absolute()
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f'{field}={path} is there already; valid: a new folder')
  there = next(part for part in (folder, *folder.parents) if part.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise UserError(
      f'{field}={path}: {there} is no folder to write to; valid: a new folder elsewhere'
    )


@contextlib.contextmanager
def whole_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write in, which becomes the new folder `path` at the end of the block: `path` is there
  with everything in it, or not at all. What a process that was killed has left is removed."""
  path = pathlib.Path(os.path.expanduser(path)).absolute()
  scratch = path.parent / f'.incomplete-{path.name}'
  with writing(path):
    scratch.mkdir(parents=True, exist_ok=True)
    with lock.held(scratch / 'lock', str(path)):
      whole = scratch / path.name
      shutil.rmtree(whole, ignore_errors=True)
      try:
        whole.mkdir()
        yield whole
        whole.rename(path)
      finally:
        shutil.rmtree(scratch, ignore_errors=True)


class Workdir:
  """A run's folder, opened for the run that it belongs to.

  Raises UserError where the folder holds a run with another config or another corpus, or has done
  more steps than the config asks for. Nothing is written before `open`; from then to `close` no other
  process can open the folder.
  """

  def __init__(self, path: str, config: ConfigDict, data: Data) -> None:
    require(path != '', 'workdir', path, "a new folder, or a run's")
    self.path = pathlib.Path(os.path.expanduser(path))
    self.config, self.data = config, data
    for part in (self.path, *self.path.parents):
      if part.exists() and not part.is_dir():
        raise UserError(f"workdir {path}: {part} is a file; valid: a new folder, or a run's")
    self._compare()
    self._lock = contextlib.ExitStack()
    self._events: EventsWriter | None = None
    self._first = 1  # step that this process logs

  def has_checkpoints(self) -> bool:
    """Whether a run has saved here, whatever became of its files."""
    return any((self.path / CHECKPOINTS).glob('[0-9]*'))

  def open(self) -> None:
    """Makes the folder, locks it and writes what describes the run. Raises UserError where another
    process has locked it."""
    with writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
    self._lock.enter_context(lock.held(self.path / 'lock', f'workdir {self.path}'))
    self._compare()  # again: another process may have trained here since
    write_json(self.path / CONFIG, with_format(configs.to_json(self.config)))
    write_json(self.path / 'env.json', environment())
    write_json(self.path / 'data.json', self.data.card)
    write_json(self.path / 'tokenizer.json', self.data.tokenizer.to_json())

  def result(self, steps: int) -> JsonObject | None:
    """`result.json` of the run if it has finished `steps` steps.

    Raises UserError where it is damaged or of another run.
    """
    file = self.path / 'result.json'
    result = read_json(file, Result) if file.exists() else None
    if not result or result['metrics']['steps'] != steps:
      return None
    if fixed(result['config']) != fixed(configs.to_json(self.config)):
      raise UserError(
        f"{file} is of a run with another config; valid: the run's own, or none: it is written anew"
      )
    return result

  def write_result(self, values: JsonObject) -> None:
    """Marks the run as finished."""
    write_json(self.path / 'result.json', values)

  def resume_metrics(self, step: int) -> None:
    """Drops what continuing from `step` logs again: the lines and the events of later steps.

    Damaged lines are dropped too, such as the half line of a process that was killed.
    """
    self._first = step + 1
    if (self.path / LOG).exists():
      kept = [text for text, values in self._lines() if values['step'] <= step]
      _replace(self.path / LOG, b''.join(kept))

  def log(self, step: int, values: dict[str, float]) -> None:
    """Appends a line to metrics.jsonl and the same numbers to the TensorBoard events."""
    with writing(self.path / LOG), (self.path / LOG).open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    with writing(self.path / 'events'):
      for name, value in values.items():
        scalar = summary.scalar(name, value)
        self._open_events().write_event(Event(wall_time=time.time(), step=step, summary=scalar))

  def logged(self, name: str) -> list[float]:
    """All values of one number in metrics.jsonl, oldest first."""
    return [line[name] for _, line in self._lines() if name in line]

  def close(self) -> None:
    """Lets other processes open the folder."""
    self._lock.close()
    if self._events is not None:
      with writing(self.path / 'events'):
        self._events.close()

  def _open_events(self) -> EventsWriter:
    """Writes in this thread: `SummaryWriter` has one of its own, and nobody catches its errors."""
    if self._events is None:
      folder = self.path.absolute() / 'events'
      folder.mkdir(exist_ok=True)
      # The file is named by the second: without the suffix, a run that is continued within one would
      # replace its own file.
      self._events = EventsWriter(str(folder / 'events'), f'.{self._first:012}')
      # TensorBoard hides the events from this step on that earlier files hold.
      begin = SessionLog(status=SessionLog.START)
      self._events.write_event(Event(wall_time=time.time(), step=self._first, session_log=begin))
    return self._events

  def _lines(self) -> list[tuple[bytes, dict[str, float]]]:
    """`read_log` of the run, perhaps none."""
    file = self.path / LOG
    return read_log(file) if file.exists() else []

  def _compare(self) -> None:
    if not (self.path / CONFIG).exists():
      return
    old = configs.flat(read_config(self.path))
    new = configs.flat(configs.to_json(self.config))
    # Names first: another method explains why its fields differ too.
    for field in sorted({*old, *new} - set(FREE), key=lambda f: (not f.endswith('name'), f)):
      if old.get(field) != new.get(field):
        raise UserError(
          f'workdir {self.path} holds a run with config.{field}={old.get(field)!r}, not '
          f'{new.get(field)!r}; valid: that value, or another workdir'
        )
    if (self.path / 'tokenizer.json').exists():  # the last of what `open` writes
      check_text(self.path, self.data, 'workdir')
    names = [folder.name for folder in self.path.glob(f'{CHECKPOINTS}/*')]
    done = max((int(name) for name in names if name.isdigit()), default=0)
    if done > self.config.train.steps:
      raise UserError(
        f'config.train.steps={self.config.train.steps} is below the {done} steps that workdir '
        f'{self.path} has done; valid: {done} or more'
      )
