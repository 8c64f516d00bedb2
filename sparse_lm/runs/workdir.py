"""The folder of a run (its workdir).

It holds config.json, env.json, data.json, tokenizer.json, metrics.jsonl, TensorBoard events, checkpoints,
and result.json once the run has finished.
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
from sparse_lm.runs.run_folder import CHECKPOINTS, CONFIG, LOG, WEIGHTS, read_config, with_format

DATA = 'data.json'  # the card of the text
# Fields that may change when a run is continued: the number of steps and the intervals.
FREE = ('train.steps', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')


class _Metrics(TypedDict):
  """Metrics by name. A metric that was not measured is `None`."""

  steps: int


class Result(TypedDict):
  """The contents of result.json."""

  config: dict[str, object]
  env: dict[str, object]
  data: Card
  evaluation: dict[str, dict[str, object]]
  causal: dict[str, bool]
  metrics: _Metrics


def write_json(path: pathlib.Path, values: JsonObject) -> None:
  """Replaces the file `path` at once, with a digest of its content. Readers never see half of it."""
  _replace(path, records.sealed(values).encode())


def _replace(path: pathlib.Path, text: bytes) -> None:
  with writing(path):
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_bytes(text)
    os.replace(temporary, path)


def read_json(path: pathlib.Path, schema: records.Schema = records.OBJECT) -> Json:
  """Reads a file of `write_json` and checks it against `schema`; see `core.records.read`."""
  return records.read(path, schema)


def read_log(path: pathlib.Path) -> list[tuple[bytes, dict[str, float]]]:
  """Returns the text and the metrics of the intact lines of a metrics.jsonl.

  Damaged lines are left out, and one line on stderr names them.
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
  """Raises UserError, with the name `field`, if a workdir's run was trained on other text or tokens.

  An imported model has no text, so only its tokenizer is compared.
  """
  imported = (folder / WEIGHTS).is_dir() and not (folder / DATA).exists()
  if not imported and read_json(folder / DATA, Card)['sha256'] != data.card['sha256']:
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
  """Returns the fields of a config.json, by dotted name, that must not change when a run continues."""
  free = (*FREE, WRITTEN_BY)  # another version may continue a run
  return {field: value for field, value in configs.flat(config).items() if field not in free}


def check_new(path: str, field: str) -> None:
  """Raises UserError, with the name `field`, unless a new folder can be made at `path`.

  An empty folder is valid too.
  """
  require(path != '', field, path, 'a new folder')
  folder = pathlib.Path(os.path.expanduser(path)).absolute()
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(f'{field}={path} already exists; valid: a new folder')
  there = next(part for part in (folder, *folder.parents) if part.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise UserError(
      f'{field}={path}: {there} is not a writable folder; valid: a new folder elsewhere'
    )


@contextlib.contextmanager
def whole_folder(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that becomes the new folder `path` when the block ends.

  So `path` appears with all its files, or not at all. Files of a killed process are removed.
  """
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


def _complete(config: JsonObject, path: pathlib.Path) -> JsonObject:
  """Returns the `fixed` fields of a config.json, with those that joined since it was written."""
  return fixed(configs.to_json(configs.of_run(config, path)))


def _only_fields_of(old: JsonObject, new: JsonObject) -> JsonObject:
  """Returns `new` without the fields that `old` does not have."""
  kept = {}
  for key, value in new.items():
    if key in old:
      nested = isinstance(value, dict) and isinstance(old[key], dict)
      kept[key] = _only_fields_of(old[key], value) if nested else value
  return kept


class Workdir:
  """The folder of a run.

  Nothing is written before `open`. From `open` to `close` no other process can open the folder.

  Raises UserError if the folder holds a run with another config or on other text, or if its run has done
  more steps than the config asks for.
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
    """True if the folder has checkpoints, intact or not."""
    return any((self.path / CHECKPOINTS).glob('[0-9]*'))

  def open(self) -> None:
    """Makes the folder, locks it and writes config.json, env.json, data.json and tokenizer.json.

    Raises UserError if another process has locked the folder.
    """
    with writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
    self._lock.enter_context(lock.held(self.path / 'lock', f'workdir {self.path}'))
    self._compare()  # again: another process may have trained here since
    write_json(self.path / CONFIG, with_format(self._written()))
    write_json(self.path / 'env.json', environment())
    write_json(self.path / DATA, self.data.card)
    write_json(self.path / 'tokenizer.json', self.data.tokenizer.to_json())

  def _written(self) -> JsonObject:
    """Returns the values of config.json. A run that an older version began keeps the fields it has.

    Checkpoints hold a digest of them, and fields that joined since have their defaults.
    """
    values = configs.to_json(self.config)
    if not (self.path / CONFIG).exists():
      return values
    return _only_fields_of(read_config(self.path), values)

  def result(self, steps: int) -> JsonObject | None:
    """Returns the contents of result.json if the run has finished `steps` steps, otherwise `None`.

    Raises UserError if the file is damaged or belongs to another run.
    """
    file = self.path / 'result.json'
    result = read_json(file, Result) if file.exists() else None
    if not result or result['metrics']['steps'] != steps:
      return None
    if _complete(result['config'], file) != fixed(configs.to_json(self.config)):
      raise UserError(
        f'{file} is of a run with another config; valid: the file of this run, or remove it'
      )
    return result

  def write_result(self, values: JsonObject) -> None:
    """Marks the run as finished."""
    write_json(self.path / 'result.json', values)

  def resume_metrics(self, step: int) -> None:
    """Removes the log of the steps after `step`, because training logs them again.

    Damaged lines are removed too, such as the half line of a killed process.
    """
    self._first = step + 1
    if (self.path / LOG).exists():
      kept = [text for text, values in self._lines() if values['step'] <= step]
      _replace(self.path / LOG, b''.join(kept))

  def log(self, step: int, values: dict[str, float]) -> None:
    """Appends metrics to metrics.jsonl and to the TensorBoard events."""
    with writing(self.path / LOG), (self.path / LOG).open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    with writing(self.path / 'events'):
      for name, value in values.items():
        scalar = summary.scalar(name, value)
        self._open_events().write_event(Event(wall_time=time.time(), step=step, summary=scalar))

  def logged(self, name: str) -> list[float]:
    """Returns all logged values of a metric, in the order of the steps."""
    return [line[name] for _, line in self._lines() if name in line]

  def close(self) -> None:
    """Closes the log and unlocks the folder."""
    self._lock.close()
    if self._events is not None:
      with writing(self.path / 'events'):
        self._events.close()

  def _open_events(self) -> EventsWriter:
    """Returns a writer that writes in this thread.

    `SummaryWriter` would write in a thread of its own, whose errors nobody catches.
    """
    if self._events is None:
      folder = self.path.absolute() / 'events'
      folder.mkdir(exist_ok=True)
      # The file is named by the second. Without the suffix, a run that continues within the same second
      # would replace its own file.
      self._events = EventsWriter(str(folder / 'events'), f'.{self._first:012}')
      # TensorBoard hides the events of earlier files from this step on.
      begin = SessionLog(status=SessionLog.START)
      self._events.write_event(Event(wall_time=time.time(), step=self._first, session_log=begin))
    return self._events

  def _lines(self) -> list[tuple[bytes, dict[str, float]]]:
    """Returns the lines of the log, an empty list if there is no log."""
    file = self.path / LOG
    return read_log(file) if file.exists() else []

  def _compare(self) -> None:
    if not (self.path / CONFIG).exists():
      return
    old = _complete(read_config(self.path), self.path / CONFIG)
    new = configs.flat(configs.to_json(self.config))
    # Names of methods come first, because they explain why other fields differ too.
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
