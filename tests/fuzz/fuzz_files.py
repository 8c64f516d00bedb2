"""Damaged files: each is refused in one line, or read as if it were whole.

A seed is a file and a way to damage it (fuzz_damage.py). What is read must be what the undamaged
file gives: logits, results and tables to the last digit.
"""

import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import sys
from collections.abc import Callable
from typing import Any

import fuzz_damage
import jax
import numpy as np
from fuzz_configs import SMALL, words
from fuzz_worker import Shown, allow, command

from sparse_lm import cost, generate, pack
from sparse_lm.commands.parser import one_line
from sparse_lm.data import pipeline, prepared
from sparse_lm.data import prepare as prepare_data
from sparse_lm.report import __main__ as report
from sparse_lm.report import results as lines
from sparse_lm.runs import configs, runnable, trained
from sparse_lm.train import __main__ as train

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, MORE, EVERY = 6, 8, 2  # of the run, of the run continued, between its checkpoints
TRAINING_SECONDS = 60  # of processor time: most of it is compilation
TIMES = ('train_step_ms', 'tokens_per_second')  # metrics that differ from run to run
Value = Any  # what a reading compares
references: dict[str, Value] = {}  # by the reading's name, of the undamaged files


def _config(steps: int) -> list[str]:
  """The command line of the run."""
  given = SMALL | {
    'data.tokenizer': 'chars',
    'data.path': 'text.txt',
    'weight.sparsity': 0.5,
    'weight.period': 2,
    'train.steps': steps,
    'train.log_every': 1,
    'train.checkpoint_every': EVERY,
    'train.eval_every': 4,
  }
  fields = [f'--config.{name}={value}' for name, value in given.items()]
  return [f'--config={ROOT}/configs/rigl.py', *fields]


def _training(steps: int) -> tuple[Shown, Value]:
  """Trains on to a number of steps, or finds that done."""
  allow(TRAINING_SECONDS)
  shown = command(train.main, *_config(steps), '--workdir=run')
  if shown.status:
    return shown, None
  metrics = json.loads(pathlib.Path('run/result.json').read_text())['metrics']
  return shown, {name: value for name, value in metrics.items() if name not in TIMES}


def finished() -> tuple[Shown, Value]:
  """The same command again: what the finished run has in its result.json."""
  return _training(STEPS)


def continued() -> tuple[Shown, Value]:
  """The run with more steps, from its newest checkpoint."""
  return _training(MORE)


@functools.cache
def _forward(model: Any) -> Callable:
  return jax.jit(lambda variables, tokens: model.apply(variables, tokens, mode='eval'))


def _print_logits(found: runnable.Runnable) -> None:
  spec = found.model.spec
  tokens = np.arange(spec.context, dtype=np.int32)[None] % spec.vocab
  logits = np.asarray(_forward(found.model)(found.variables, tokens))
  text = found.tokenizer.decode(tokens[0])
  print(hashlib.sha256(logits.tobytes()).hexdigest(), spec.vocab, repr(text))


@one_line
def _print_run() -> None:
  found = trained.load('run')
  print(found.step, found.costs())
  _print_logits(runnable.load('run'))


def loaded() -> tuple[Shown, Value]:
  """The run from Python: its step, costs, logits and tokenizer."""
  shown = command(_print_run)
  return shown, shown.out


def unpacked() -> tuple[Shown, Value]:
  """The packed folder from Python: its logits and tokenizer."""
  shown = command(one_line(lambda: _print_logits(runnable.load('packed'))))
  return shown, shown.out


def generated() -> tuple[Shown, Value]:
  """Greedy text of the run."""
  return _generated('run')


def generated_packed() -> tuple[Shown, Value]:
  """Greedy text of the packed folder."""
  return _generated('packed')


def _generated(folder: str) -> tuple[Shown, Value]:
  given = (f'--workdir={folder}', '--prompt=the ri', '--temperature=0', '--tokens=4')
  shown = command(generate.main, *given)
  return shown, shown.out


def read_tfds() -> tuple[Shown, Value]:
  """The corpus of a TFDS folder: the digests of its splits."""
  shown = command(one_line(lambda: print(prepared.read('tfds').card['sha256'])))
  return shown, shown.out


def reported() -> tuple[Shown, Value]:
  """The table of the lines of a study."""
  shown = command(report.main, 'runs.jsonl', '--rows=method', '--columns=val_loss,steps')
  return shown, shown.out


@one_line
def _round_trip() -> None:
  config = configs.load(str(ROOT / 'configs/tiny.py'), {'data.source': 'files'})
  with config.unlocked():
    config.data.path = 'text.txt'
  for name in ('bytes', 'chars', 'bpe'):
    with config.unlocked():
      config.data.tokenizer = name
    data = pipeline.load(config.data)
    whole = b''.join(data.tokenizer.decode(ids).encode() for ids in data.tokens.values())
    print(name, whole == pathlib.Path('text.txt').read_bytes())


def tokenized() -> tuple[Shown, Value]:
  """A text file through every tokenizer and back."""
  shown = command(_round_trip)
  return shown, shown.out


def own_config() -> tuple[Shown, Value]:
  """A config file that a user wrote: what it may mean is the user's business."""
  text = [
    f'--config.{name}={SMALL[name]}' for name in ('data.source', 'data.context', 'data.batch')
  ]
  return command(cost.main, '--config=config.py', '--config.data.path=text.txt', *text), None


# By kind of file: where it is, and what reads it.
KINDS: dict[str, tuple[str, tuple[Callable[[], tuple[Shown, Value]], ...]]] = {
  'config': ('run/config.json', (loaded, generated, finished)),
  'environment': ('run/env.json', (finished, continued)),
  'data card': ('run/data.json', (finished, continued)),
  'tokenizer': ('run/tokenizer.json', (loaded, generated, finished)),
  'result': ('run/result.json', (finished,)),
  'metrics': ('run/metrics.jsonl', (continued,)),
  'newest checkpoint': (f'run/checkpoints/{STEPS}/**/*', (loaded, loaded, generated, continued)),
  'any checkpoint': ('run/checkpoints/**/*', (loaded, continued)),
  'packed config': ('packed/config.json', (unpacked, generated_packed)),
  'packed tokenizer': ('packed/tokenizer.json', (unpacked, generated_packed)),
  'packed manifest': ('packed/packed.json', (unpacked, unpacked, generated_packed)),
  'packed arrays': ('packed/packed.safetensors', (unpacked,)),
  'plain arrays': ('packed/model.safetensors', (unpacked,)),
  'TFDS description': ('tfds/text/1.0.0/*.json', (read_tfds,)),
  'TFDS text': ('tfds/text/1.0.0/*.array_record*', (read_tfds,)),
  'lines': ('runs.jsonl', (reported,)),
  'text': ('text.txt', (tokenized,)),
  'own config': ('config.py', (own_config,)),
}


def prepare(folder: pathlib.Path) -> None:
  """Makes every kind of file, and notes what the undamaged ones give."""
  whole = folder / 'whole'
  if not whole.exists():
    making = folder / 'making'
    making.mkdir()
    os.chdir(making)
    pathlib.Path('text.txt').write_text(words())
    (making / 'config.py').write_text((ROOT / 'configs/tiny.py').read_text())
    _done(command(train.main, *_config(STEPS), '--workdir=run'))
    _done(command(pack.main, '--workdir=run', '--out=packed'))
    _done(command(prepare_data.main, '--kind=text', '--out=tfds', 'text.txt'))
    for seed in range(3):
      loss = 1.5 + seed / 3
      metrics = {'val_loss': loss, 'steps': STEPS, 'flops_forward_ratio': 0.5}
      line = {'study': 'x', 'run': f'r{seed}', 'labels': {'method': 'rigl'}, 'seed': seed}
      lines.append(pathlib.Path('runs.jsonl'), line | {'metrics': metrics})
    making.rename(whole)
  (folder / 'fuzz_trap.py').write_text(f"open({str(folder / 'sprung')!r}, 'w')\nclass Trap: pass\n")
  sys.path.insert(0, str(folder))
  for reading in {reading for _, readings in KINDS.values() for reading in readings}:
    with _copy(folder):
      shown, references[reading.__name__] = reading()
      _done(shown)
  for step in range(EVERY, STEPS, EVERY):
    with _copy(folder):
      for newer in range(step + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(f'run/checkpoints/{newer}')
      for reading in (loaded, generated, continued):
        references[f'{reading.__name__} {step}'] = reading()[1]
  allow(0)


def _done(shown: Shown) -> None:
  if shown.status:
    raise RuntimeError(shown.err)


class _copy:
  """A copy of the undamaged files, as the current folder."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder

  def __enter__(self) -> None:
    os.chdir(self.folder)
    shutil.rmtree('case', ignore_errors=True)
    shutil.copytree('whole', 'case', symlinks=True)
    os.chdir('case')

  def __exit__(self, *_: Any) -> None:
    os.chdir(self.folder)


def case(seed: int, folder: pathlib.Path) -> dict[str, str]:
  """Damages a file by the seed and reads it; `fault` says what is wrong, '' if nothing is."""
  draw = random.Random(seed)
  kind = list(KINDS)[seed % len(KINDS)]
  pattern, readings = KINDS[kind]
  with _copy(folder):
    path = draw.choice(sorted(p for p in pathlib.Path().glob(pattern) if p.is_file()))
    how = fuzz_damage.damage(path, draw)
    reading = draw.choice(readings)
    shown, value = reading()
  fault = shown.fault() or _difference(reading.__name__, value, shown)
  if (folder / 'sprung').exists():
    (folder / 'sprung').unlink()
    fault = 'code that the file names was run'
  return {
    'command': f'{reading.__name__} after {path}: {how}',
    'fault': fault,
    'outcome': f'{kind}: {"refused" if shown.status else "read"}',
    'shown': (shown.out[-300:] + shown.err[-3000:]).strip(),
  }


def _difference(reading: str, value: Value, shown: Shown) -> str:
  """What is wrong with a value that was accepted."""
  if shown.status:
    return ''
  allowed = [references[reading]]
  if 'corrupt: ' in shown.err:  # an older checkpoint, and the user is told
    allowed += [other for name, other in references.items() if name.startswith(f'{reading} ')]
  if reading == 'reported' and 'left out' in shown.err:
    return ''
  return '' if value in allowed else f'accepted, and other than {references[reading]!r:.300}'
