"""Every file in configs/ loads, builds, takes a step, and says what it costs and gives."""

import ast
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm, slots
from sparse_lm.runs import configs
from sparse_lm.runs.setup import setup

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
  if all(full[f'{slot}.layers'] == ':' for slot in slots.LAYER_SLOTS):
    sizes['model.layers'] = 1
  # A matrix has several tiles of every pattern of blocks.
  patterns = [str(value) for field, value in full.items() if field.endswith('.pattern')]
  side = max((int(p.removeprefix('block:')) for p in patterns if p.startswith('block:')), default=0)
  for field in ('model.width', 'model.hidden'):
    sizes[field] = max(sizes[field], min(full[field], 2 * side))
  sizes['model.kv_heads'] = max(1, full['model.kv_heads'] * 2 // full['model.heads'])
  sizes['train.accumulation'] = min(full['train.accumulation'], 2)
  # A floor of a few weights for each channel is much of so small a matrix.
  sizes['weight.sparsity'] = min(full['weight.sparsity'], 0.75)
  # The head is most of so small a model, and no gate skips it.
  sizes['budget.target'] = max(full['budget.target'], 0.9)
  sizes |= {'data.source': 'files', 'data.path': str(text_file)}
  return configs.load(path, sizes)


# In `make test` the contract does both for every method.
@pytest.mark.slow
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


@functools.cache
def leaks(model, mode):
  """Whether substituting later tokens moves an earlier logit, or `None` if it moves no later one."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, model.spec.vocab, (2, model.spec.context)).astype(np.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  variables = {name: variables[name] for name in variables if name not in SOWN}
  # The head starts at zero, and equal logits would hide any leak.
  variables = jax.tree.map(
    lambda a: jnp.asarray(rng.normal(0.5 * (a.ndim < 2), 0.3, a.shape), a.dtype), variables
  )
  rngs = {'dropout': jax.random.key(1), 'gates': jax.random.key(2)}
  run = jax.jit(lambda v, t: model.apply(v, t, mode, rngs=rngs, mutable=True)[0])
  half = model.spec.context // 2
  changed = tokens.copy()
  changed[:, half:] = (changed[:, half:] + 1) % model.spec.vocab
  moved = np.abs(run(variables, changed) - run(variables, tokens)).max(axis=(0, 2))
  return bool(moved[:half].max() > 1e-5) if moved[half:].max() > 1e-3 else None


@pytest.mark.slow
@pytest.mark.parametrize('mode', lm.MODES)
@pytest.mark.parametrize('name', FILES)
def test_config_keeps_to_the_past_unless_it_says_otherwise(name, mode, text_file):
  config = shrunk(name, text_file)
  model = lm.from_config(config, vocab=11)
  # That a declared leak is one is shown in tests/methods/, where it can be provoked.
  assert leaks(model, mode) is False or not lm.causal(model)[mode]


@pytest.mark.parametrize('name', [name for name in FILES if name != 'base'])
def test_docstring_says_command_time_and_metric(name):
  source = (ROOT / 'configs' / f'{name}.py').read_text(encoding='utf-8')
  text = ' '.join((ast.get_docstring(ast.parse(source)) or '').split())
  assert f'python -m sparse_lm.train --config=configs/{name}.py' in text
  assert re.search(r'\d\s*(s|seconds?|min|minutes?|h|hours?)\b', text), 'no measured time'
  metric = r'(loss|perplexity|bits per byte|accuracy)\D{0,60}\d+\.\d+'
  reverse = r'\d+\.\d+\D{0,30}(loss|perplexity|nats|bits per byte)'
  assert re.search(f'{metric}|{reverse}', text), 'no expected metric'


def test_the_name_of_a_config_where_a_method_is_expected_points_to_the_config():
  with pytest.raises(UserError) as refused:
    configs.load('configs/tiny.py', {'weight.name': 'ste'})
  message = str(refused.value)
  assert "config.weight.name='ste' is not a method" in message and len(message) < 290
  assert '--config=configs/ste.py, whose config.weight has' in message
  own = configs.load('configs/ste.py').weight
  assert all(f'{key}={own[key]!r}' in message for key in ('name', 'sparsity', 'apply', 'schedule'))
  with pytest.raises(UserError, match=r"^unknown config\.mlp\.name 'ste'"):  # it sets no MLP
    configs.load('configs/tiny.py', {'mlp.name': 'ste'})
