"""The folder of a run.

config.json, env.json, data.json, tokenizer.json, metrics.jsonl, TensorBoard events, checkpoints and,
once it has finished, result.json.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from sparse_lm.core import config as configs
from sparse_lm.core.errors import UserError
from sparse_lm.data.pipeline import Data

# What may differ when a run is continued: its length, and what it writes on the way.
FREE = ('train.steps', 'train.log_every', 'train.eval_every', 'train.checkpoint_every')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def environment() -> dict[str, Any]:
  """Versions, git revision and device, as JSON values."""
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    'git': _git_revision(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    'cpu': _cpu_model(),
    'cores': os.cpu_count(),
  }


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
  """Replaces `path` as a whole: a reader never sees half of it."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(values, indent=2) + '\n')
  os.replace(temporary, path)


class Workdir:
  """A run's folder, opened for the run that it belongs to.

  Raises UserError where the folder holds a run with another config or another corpus.
  """

  def __init__(self, path: str, config: ConfigDict, data: Data) -> None:
    self.path = pathlib.Path(path)
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f"workdir {path} is a file; valid: a new folder, or a run's")
    self._compare(config, data.card)
    self.path.mkdir(parents=True, exist_ok=True)
    write_json(self.path / 'config.json', configs.to_json(config))
    write_json(self.path / 'env.json', environment())
    write_json(self.path / 'data.json', data.card)
    write_json(self.path / 'tokenizer.json', data.tokenizer.to_json())
    self._events: SummaryWriter | None = None

  def result(self, steps: int) -> dict[str, Any] | None:
    """`result.json` of the run if it has finished `steps` steps."""
    file = self.path / 'result.json'
    result = json.loads(file.read_text()) if file.exists() else None
    return result if result and result['metrics']['steps'] == steps else None

  def write_result(self, values: dict[str, Any]) -> None:
    """Marks the run as finished."""
    write_json(self.path / 'result.json', values)

  def resume_metrics(self, step: int) -> None:
    """Drops what was logged after `step`, which will be logged again."""
    file = self.path / 'metrics.jsonl'
    if file.exists():
      kept = [line for line in file.read_text().splitlines() if _logged_step(line) <= step]
      temporary = file.with_name(file.name + '.tmp')
      temporary.write_text(''.join(f'{line}\n' for line in kept))
      os.replace(temporary, file)

  def log(self, step: int, values: dict[str, float]) -> None:
    """Appends a line to metrics.jsonl and the same numbers to the TensorBoard events."""
    with (self.path / 'metrics.jsonl').open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    if self._events is None:
      self._events = SummaryWriter(str(self.path / 'events'))
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def logged(self, name: str) -> list[float]:
    """All values of one number in metrics.jsonl, oldest first."""
    lines = map(json.loads, (self.path / 'metrics.jsonl').read_text().splitlines())
    return [line[name] for line in lines if name in line]

  def close(self) -> None:
    """Writes out the events."""
    if self._events is not None:
      self._events.close()

  def _compare(self, config: ConfigDict, data_card: dict[str, Any]) -> None:
    file = self.path / 'config.json'
    if not file.exists():
      return
    old = configs.flat(json.loads(file.read_text()))
    new = configs.flat(configs.to_json(config))
    # Names first: another method explains why its fields differ too.
    for field in sorted({*old, *new} - set(FREE), key=lambda f: (not f.endswith('name'), f)):
      if old.get(field) != new.get(field):
        raise UserError(
          f'workdir {self.path} holds a run with config.{field}={old.get(field)!r}, not '
          f'{new.get(field)!r}; valid: that value, or another workdir'
        )
    card = self.path / 'data.json'
    if card.exists() and json.loads(card.read_text())['sha256'] != data_card['sha256']:
      raise UserError(
        f'workdir {self.path} holds a run on other text (its sha256 in data.json differs); valid: '
        'the same text, or another workdir'
      )


def _logged_step(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (json.JSONDecodeError, KeyError):
    return float('inf')  # half a line, of a run that was killed


def _git_revision() -> str:
  here = pathlib.Path(__file__).parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def _cpu_model() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return models[0] if models else platform.processor() or platform.machine()
