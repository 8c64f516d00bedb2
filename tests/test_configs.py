"""Every file in configs/ loads, builds, takes a step, and says what it costs and gives."""

import ast
import math
import pathlib
import re

import jax
import pytest

from sparse_lm.core import config as configs
from sparse_lm.core import slots
from sparse_lm.train.setup import setup

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != '__init__')

# No larger than this, and smaller where the config is.
LARGEST = {
  'data.context': 16,
  'data.batch': 4,
  'model.layers': 2,
  'model.width': 16,
  'model.hidden': 32,
  'model.heads': 2,
  'train.steps': 10,
}


def shrunk(name, text_file):
  """The config with its own choices and small sizes, on the small text file."""
  path = str(ROOT / 'configs' / f'{name}.py')
  full = configs.flat(configs.load(path))
  sizes = {field: min(full[field], most) for field, most in LARGEST.items()}
  if all(full[f'{slot}.layers'] == ':' for slot in slots.SLOTS if slot != 'weight'):
    sizes['model.layers'] = 1
  sizes['model.kv_heads'] = max(1, full['model.kv_heads'] * 2 // full['model.heads'])
  sizes['train.accumulation'] = min(full['train.accumulation'], 2)
  sizes |= {'data.source': 'files', 'data.path': str(text_file)}
  return configs.load(path, sizes)


@pytest.mark.parametrize('name', FILES)
def test_config_builds_and_steps(name, text_file):
  run = setup(shrunk(name, text_file))
  state = run.program.init(run.config.seed, run.target)
  batches = run.data.train_iterator(0)
  before = jax.device_get(state.trainable)
  for step in range(2):  # the head starts at zero, and nothing below it moves before it does
    state, metrics = run.program.step(step)(state, next(batches))
    assert math.isfinite(metrics['loss']) and math.isfinite(metrics['gradient_norm'])
  same = jax.tree.map(lambda a, b: bool((a == b).all()), before, jax.device_get(state.trainable))
  assert not all(jax.tree.leaves(same))


@pytest.mark.parametrize('name', [name for name in FILES if name != 'base'])
def test_docstring_says_command_time_and_metric(name):
  source = (ROOT / 'configs' / f'{name}.py').read_text(encoding='utf-8')
  text = ' '.join((ast.get_docstring(ast.parse(source)) or '').split())
  assert f'python -m sparse_lm.train --config=configs/{name}.py' in text
  assert re.search(r'\d\s*(s|seconds?|min|minutes?|h|hours?)\b', text), 'no measured time'
  metric = r'(loss|perplexity|bits per byte|accuracy)\D{0,60}\d+\.\d+'
  reverse = r'\d+\.\d+\D{0,30}(loss|perplexity|nats|bits per byte)'
  assert re.search(f'{metric}|{reverse}', text), 'no expected metric'
