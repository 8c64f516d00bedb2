"""Random configs: each is priced, and trained for a few steps where it is accepted and small.

A seed is a config: which methods, which fields and which values follow from it alone.
"""

import json
import math
import pathlib
import random
import shutil

from fuzz_worker import Shown, allow, command

from sparse_lm import cost
from sparse_lm.commands.config_arguments import overrides_from_args
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.runs import configs
from sparse_lm.train import __main__ as train

STEPS = 3
SMALL = {
  'data.source': 'files',
  'data.context': 16,
  'data.batch': 4,
  'model.layers': 2,
  'model.width': 16,
  'model.hidden': 32,
  'model.heads': 2,
  'model.kv_heads': 2,
  'train.steps': STEPS,
}
# A config with more of these is priced and not trained: it may be large.
LARGEST = {
  'data.context': 64,
  'data.batch': 16,
  'model.layers': 4,
  'model.width': 64,
  'model.hidden': 256,
  'train.steps': 10,
}
TRAINING_SECONDS = 60  # of processor time: most of it is compilation
FILES = sorted(path for path in pathlib.Path('configs').glob('*.py') if path.stem != '__init__')
# What few fields take: by sign, by size, by type, by spelling, by encoding.
NUMBERS = (
  '-1', '0', '1', '2', '3', '7', '-0.0', '0.5', '1.0', '0.99999', '1.00001', '1e-30', '1e30', '1e308',
  '-1e308', '1e400', 'nan', 'inf', '-inf', str(2**31 - 1), str(2**31), str(2**63), '1' + 400 * '0',
  5000 * '9', '0x10', '1_0', '٣', '1e5', '1000000007',
)  # fmt: skip
TEXTS = (
  '', ' ', 'None', 'True', '()', '[]', '{}', '(0.5, 0.5)', '(1, 2, 3)', "('a',)", '[[1]]', 5000 * '[',
  5000 * '(' + 5000 * ')', 'a', '%s', '{0}', '\n', '\ufffd', '🙂', '\udcff', 3000 * 'a', '-', '=', '*',
  '(', '[', '\\', '/', '..', '/dev/null', '/dev/zero', '/proc/self/mem', '~', '~nobody', '$HOME', ':',
  '::', '::0', '1:', '-1:', '2::2', '::-1', 'a=0.5,b=0.9', '*=2', 'mlp=0.5,attention=0.9', '2:4', '4:2',
  '0:0', '2:0', '16x16', '8x8', '0x0', '1e5x1', '3:7', 'block', 'row', 'global', 'lambda: 0',
  '__import__("os").abort()', 'fan_in', 'bytes', 'bpe', 'mixture', 'tfds', 'stdlib=1', '--config.seed=1',
)  # fmt: skip


def words() -> str:
  """A text to train on."""
  return ' '.join(random.Random(0).choices(['the', 'of', 'river', 'stone', 'a\n', 'blue'], k=1500))


def prepare(folder: pathlib.Path) -> None:
  """The text that all of them read."""
  (folder / 'text.txt').write_text(words())


def arguments(seed: int, folder: pathlib.Path) -> list[str]:
  """The command line of a seed."""
  draw = random.Random(seed)
  text = str(folder / 'text.txt')
  path = str(draw.choice(FILES))
  names = {}
  for slot in draw.sample(slots.SLOTS, draw.choice((0, 0, 1, 2, 5))):
    names[f'{slot}.name'] = draw.choice(slots.names(slot))
  given = SMALL | {'data.path': text, 'data.tokenizer': draw.choice(('bytes', 'chars'))} | names
  try:
    config = configs.flat(configs.load(path, given))
  except UserError:  # the file's own fields are not the drawn method's
    path, config = 'configs/tiny.py', configs.flat(configs.load('configs/tiny.py', given))
  if names and 'weight.name' in names and draw.random() < 0.7:
    given['weight.sparsity'] = draw.choice((0.0, 0.5, 0.9))
  fields = draw.sample(sorted(config), draw.choice((0, 1, 1, 1, 2, 3, 6)))
  for field in fields:
    if field.endswith('name'):
      continue  # drawn above
    given[field] = _value(draw, field, config[field], text)
  return [f'--config={path}', *(f'--config.{field}={value}' for field, value in given.items())]


def _value(draw: random.Random, field: str, now: object, text: str) -> object:
  """A value for a field: one that some config has, one near its own, or one from anywhere."""
  kind = draw.random()
  if kind < 0.4:
    usual, other = (TEXTS, NUMBERS) if isinstance(now, str | tuple) else (NUMBERS, TEXTS)
    return draw.choice(usual if kind < 0.35 else other)
  if kind < 0.65:
    return draw.choice(_elsewhere(field) or [now])
  if field == 'data.path':
    return draw.choice((text, f'files:{text}=1', f'{text}*', text[:-3], f'stdlib=1,files:{text}=2'))
  if isinstance(now, bool):
    return not now
  if isinstance(now, int):
    return draw.choice((now + 1, now - 1, -now, 2 * now, 10 * now, 10**6 * now, 10**12 * now, 0, 1))
  if isinstance(now, float):
    near = (now / 2, 2 * now, -now, 1 - now, 1e3 * now, 0.0, 1.0, 0.1, 0.25, 1e-9, 1 - 1e-9)
    return draw.choice(near)
  return draw.choice(TEXTS)


def _elsewhere(field: str) -> list[object]:
  """The values that the field has in the config files."""
  found = [configs.flat(configs.load(str(path))).get(field) for path in FILES]
  return list({repr(value): value for value in found if value is not None}.values())


def case(seed: int, folder: pathlib.Path) -> dict[str, str]:
  """Prices the config of a seed and perhaps trains it; `fault` says what is wrong, '' if nothing."""
  given = arguments(seed, folder)
  priced = command(cost.main, *given)
  found = {'command': f'sparse_lm.cost {given}', 'shown': _tail(priced), 'fault': priced.fault()}
  found['outcome'] = 'refused' if priced.status else 'priced'
  if priced.status or found['fault']:
    return found
  words = priced.out.replace('|', ' ').split()
  if wrong := [word for word in words if word in ('nan', 'inf', '-inf') or _negative(word)]:
    return found | {'fault': f'accepted, with a cost of {wrong[0]}'}
  if _small(given) and seed % 4 == 0:
    found = _trained(seed, given, folder, found)
  return found


def _small(given: list[str]) -> bool:
  path, *rest = given
  config = configs.load(path.partition('=')[2], overrides_from_args(rest))
  flat = configs.flat(config)
  return all(flat[field] <= most for field, most in LARGEST.items())


def _trained(
  seed: int, given: list[str], folder: pathlib.Path, found: dict[str, str]
) -> dict[str, str]:
  allow(TRAINING_SECONDS)
  workdir = folder / f'run_{seed}'
  shown = command(train.main, *given, f'--workdir={workdir}')
  fault = shown.fault()
  if not shown.status and not fault:
    metrics = json.loads((workdir / 'result.json').read_text())['metrics']
    wrong = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
    fault = f'trained, with {wrong[0]}={metrics[wrong[0]]}' if wrong else ''
  shutil.rmtree(workdir, ignore_errors=True)
  return found | {
    'command': f'sparse_lm.train {given}',
    'shown': _tail(shown),
    'fault': fault,
    'outcome': 'trained' if not shown.status else 'refused in training',
  }


def _negative(word: str) -> bool:
  return word[0] == '-' and word[1:2].isdigit()


def _tail(shown: Shown) -> str:
  return (shown.out[-300:] + shown.err[-3000:]).strip()
