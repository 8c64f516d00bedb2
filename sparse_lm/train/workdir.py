"""The folder of a run.

config.json, env.json, data.json, tokenizer.json, metrics.jsonl, TensorBoard events, checkpoints and,
once it has finished, result.json.
"""

import contextlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sparse_lm.core import config as configs
from sparse_lm.core import lock
from sparse_lm.core.errors import UserError, require, writing
from sparse_lm.data.pipeline import Data
from sparse_lm.train.environment import environment

# What may differ when a run is continued: its length, and what it writes on the way.
FREE = ('train.steps', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Replaces `path` as a whole: a reader never sees half of it."""
  _replace(path, json.dumps(values, indent=2) + '\n')


def _replace(path: pathlib.Path, text: str) -> None:
  with writing(path):
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Raises UserError where the file cannot be read, or is no longer JSON."""
  try:
    return json.loads(path.read_text())
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); valid: a whole folder') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path} is damaged ({error}); valid: a copy of it, or a new workdir') from None


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
  with everything in it, or not at all."""
  path = pathlib.Path(os.path.expanduser(path))
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.incomplete-', dir=path.parent) as scratch:
      whole = pathlib.Path(scratch) / path.name
      whole.mkdir()
      yield whole
      whole.rename(path)


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

  def open(self) -> None:
    """Makes the folder, locks it and writes what describes the run. Raises UserError where another
    process has locked it."""
    with writing(self.path):
      self.path.mkdir(parents=True, exist_ok=True)
    self._lock.enter_context(lock.held(self.path / 'lock', f'workdir {self.path}'))
    self._compare()  # again: another process may have trained here since
    write_json(self.path / 'config.json', configs.to_json(self.config))
    write_json(self.path / 'env.json', environment())
    write_json(self.path / 'data.json', self.data.card)
    write_json(self.path / 'tokenizer.json', self.data.tokenizer.to_json())

  def result(self, steps: int) -> dict[str, Any] | None:
    """`result.json` of the run if it has finished `steps` steps."""
    file = self.path / 'result.json'
    result = read_json(file) if file.exists() else None
    return result if result and result['metrics']['steps'] == steps else None

  def write_result(self, values: dict[str, Any]) -> None:
    """Marks the run as finished."""
    write_json(self.path / 'result.json', values)

  def resume_metrics(self, step: int) -> None:
    """Drops what continuing from `step` logs again: the lines and the events of later steps."""
    self._first = step + 1
    file = self.path / 'metrics.jsonl'
    if file.exists():
      kept = [line for line in file.read_text().splitlines() if not self._logs_again(line, step)]
      _replace(file, ''.join(f'{line}\n' for line in kept))

  def log(self, step: int, values: dict[str, float]) -> None:
    """Appends a line to metrics.jsonl and the same numbers to the TensorBoard events."""
    with writing(self.path / 'metrics.jsonl'), (self.path / 'metrics.jsonl').open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    with writing(self.path / 'events'):
      for name, value in values.items():
        scalar = summary.scalar(name, value)
        self._open_events().write_event(Event(wall_time=time.time(), step=step, summary=scalar))

  def logged(self, name: str) -> list[float]:
    """All values of one number in metrics.jsonl, oldest first."""
    lines = map(json.loads, (self.path / 'metrics.jsonl').read_text().splitlines())
    return [line[name] for line in lines if name in line]

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

  def _logs_again(self, line: str, step: int) -> bool:
    try:
      values = json.loads(line)
    except json.JSONDecodeError:
      return True  # half a line, of a run that was killed
    return values['step'] > step

  def _compare(self) -> None:
    file = self.path / 'config.json'
    if not file.exists():
      return
    old = configs.flat(read_json(file))
    new = configs.flat(configs.to_json(self.config))
    # Names first: another method explains why its fields differ too.
    for field in sorted({*old, *new} - set(FREE), key=lambda f: (not f.endswith('name'), f)):
      if old.get(field) != new.get(field):
        raise UserError(
          f'workdir {self.path} holds a run with config.{field}={old.get(field)!r}, not '
          f'{new.get(field)!r}; valid: that value, or another workdir'
        )
    card = self.path / 'data.json'
    if card.exists() and read_json(card)['sha256'] != self.data.card['sha256']:
      raise UserError(
        f'workdir {self.path} holds a run on other text (its sha256 in data.json differs); valid: '
        'the same text, or another workdir'
      )
    names = [folder.name for folder in self.path.glob('checkpoints/*')]
    done = max((int(name) for name in names if name.isdigit()), default=0)
    if done > self.config.train.steps:
      raise UserError(
        f'config.train.steps={self.config.train.steps} is below the {done} steps that workdir '
        f'{self.path} has done; valid: {done} or more'
      )
