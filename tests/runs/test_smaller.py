"""Smaller models: what contributes nothing is removed, and the function stays."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm import prune as command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs import configs, smaller
from sparse_lm.runs.build import build
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, with_format
from sparse_lm.runs.setup import data_of
from sparse_lm.runs.trained import load
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import write_json
from sparse_lm.train import expert_use
from sparse_lm.train.layerwise import Layers, of_part

LAYERS, WIDTH, HIDDEN, HEADS, KEY_HEADS, SEGMENTS = 4, 16, 20, 4, 2, 6
MODEL = {
  'model__layers': LAYERS,
  'model__width': WIDTH,
  'model__hidden': HIDDEN,
  'model__heads': HEADS,
  'model__kv_heads': KEY_HEADS,
  'model__bias': True,
  'model__norm': 'rmsnorm',
  'model__norm_epsilon': 1e-9,
  'model__query_key_norm': 'head',
  'mlp__name': 'gated',
  'activation__name': 'relu2',
}
# What is made to contribute nothing.
IDLE_UNITS, IDLE_KEY_HEAD, IDLE_LAYER, IDLE_CHANNELS = [0, 7, 19], 1, 2, [3, 15]


@pytest.fixture(scope='module')
def write(tiny_config, tmp_path_factory):
  """`write(change, **fields)`: a workdir of random weights that `change` edits, as convert writes it."""

  def make(change=lambda path, leaf: leaf, masked=False, **fields):
    config = tiny_config(**MODEL | fields)
    tokenizer = data_of(config).tokenizer
    program, target = build(config, tokenizer.vocab_size)
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(program.init, 0, target).trainable['params']

    def leaf(path, like):
      mean = 1.0 if path.endswith('scale') else 0.0
      return change(path, draw.normal(mean, 0.3, like.shape).astype(np.float32))

    params = tree.map_named(leaf, shapes)
    folder = tmp_path_factory.mktemp('imported')
    files = WeightFiles(folder / WEIGHTS, config.model.layers)
    for part in files.parts:
      own = of_part(params, part)
      masks = jax.tree.map(lambda a: np.ones(a.shape, bool) if masked else None, own)
      files.write(part, own, masks)
    files.finish('a test')
    write_json(folder / 'tokenizer.json', tokenizer.to_json())
    write_json(folder / CONFIG, with_format(configs.to_json(config)))
    return folder

  return make


def shrunk(folder, out, **sizes):
  result = smaller.shrink(str(folder), str(out), sizes, {}, SEGMENTS)
  return load(str(folder)), load(str(out)), result


def close(whole, small):
  tokens = np.random.default_rng(1).integers(20, size=(3, 12)).astype(np.int32)
  want, got = whole.logits(tokens), small.logits(tokens)
  assert np.std(want) > 0.1
  assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def idle_units(path, leaf):
  if '/mlp/' in path and path.split('/')[2] in ('up', 'gate'):
    leaf[..., IDLE_UNITS] = 0
  return leaf


def idle_head(path, leaf):
  if '/value/' in path:
    leaf.reshape(*leaf.shape[:-1], KEY_HEADS, -1)[..., IDLE_KEY_HEAD, :] = 0
  return leaf


def idle_layer(path, leaf):
  idle = path.startswith(f'block_{IDLE_LAYER}/') and path.split('/')[2] in ('out', 'down')
  return leaf * (not idle)


def idle_channels(path, leaf):
  writes = path.split('/')[-2] in ('out', 'down')
  if path.startswith(('embed/tokens', 'embed/positions')) or writes:
    leaf[..., IDLE_CHANNELS] = 0
  return leaf


MOE = {'mlp__name': 'moe_topk', 'mlp__experts': 5, 'mlp__k': 2, 'mlp__gated': True}
IDLE_EXPERT = 3


def idle_expert(path, leaf):
  """No token visits the expert: with a positive first channel, its logits are far below the others'."""
  if path.endswith('router/kernel'):
    leaf[:, IDLE_EXPERT] = 0
    leaf[0, IDLE_EXPERT] = -1e4
  if path.startswith('embed/tokens'):
    leaf[..., 0] = 10
  if path.split('/')[-2] in ('out', 'experts') and path.endswith(('kernel', 'down', 'bias')):
    leaf[..., 0] = 0
  if path.endswith('norm_2/scale'):
    leaf[0] = 1
  return leaf


CASES = {
  'hidden': (idle_units, {'hidden': HIDDEN - len(IDLE_UNITS)}),
  'heads': (idle_head, {'heads': HEADS // 2}),
  'layers': (idle_layer, {'layers': LAYERS - 1}),
  'experts': (idle_expert, {'experts': 4}),
}


@pytest.mark.parametrize('case', CASES)
def test_what_contributes_nothing_is_removed_and_the_function_stays(case, write, tmp_path):
  change, sizes = CASES[case]
  fields = MOE if case == 'experts' else {}
  whole, small, result = shrunk(write(change, **fields), tmp_path / 'out', **sizes)
  close(whole, small)
  group = small.config.mlp if case == 'experts' else small.config.model
  assert {name: group[name] for name in sizes} == sizes
  count = sum(leaf.size for leaf in jax.tree.leaves(small.params))
  assert result['metrics']['params'] == count < result['metrics']['parent_params']
  if case == 'layers':
    assert result['layers'] == [0, 1, 3]
    assert np.argmin(result['influence']) == IDLE_LAYER and min(result['influence']) < 1e-6


def test_channels_that_nothing_writes_are_removed(write, tmp_path):
  left = WIDTH - len(IDLE_CHANNELS)
  whole, small, _ = shrunk(write(idle_channels), tmp_path / 'out', width=left)
  # The mean square is taken over fewer channels now.
  factor = np.sqrt(WIDTH / left)
  norms = ('norm', 'norm_1', 'norm_2')
  for path, leaf in tree.named(small.params).items():
    parents = path.split('/')
    if parents[-1] == 'scale' and parents[-2] in norms:
      node = small.params
      for name in parents[:-1]:
        node = node[name]
      node['scale'] = leaf * factor
  close(whole, small)


def test_all_sizes_together_and_the_same_sizes(write, tmp_path):
  folder = write()
  sizes = {'layers': 2, 'hidden': 8, 'heads': 2, 'width': 10}
  _, small, _ = shrunk(folder, tmp_path / 'small', **sizes)
  assert {name: small.config.model[name] for name in sizes} == sizes
  assert small.config.model.kv_heads == 1 and small.program.model.spec.head_dim == WIDTH // HEADS
  tokens = np.zeros((1, 5), np.int32)
  assert np.isfinite(small.logits(tokens)).all()
  same = {'layers': LAYERS, 'hidden': HIDDEN, 'heads': HEADS, 'width': WIDTH}
  whole, small, _ = shrunk(folder, tmp_path / 'same', **same)
  jax.tree.map(assert_array_equal, whole.params, small.params)


def test_contributions_are_weights_times_norms_of_outputs(write):
  trained = load(str(write(**MOE)))
  model, params = trained.program.model, trained.params['block_0']['mlp']
  x = np.random.default_rng(2).normal(size=(2, 12, WIDTH)).astype(np.float32)
  layers = Layers(model, (), {})
  own = of_part(trained.params, 0)
  got = expert_use.contributions(layers, 0, own, [x[:1], x[1:]])
  _, seen = layers.module(0).apply(
    {'params': own}, x, capture_intermediates=True, mutable=['intermediates']
  )
  (rows,) = tree.named(seen['intermediates'])['block_0/norm_2/__call__/0'].reshape(1, -1, WIDTH)
  rows, experts = np.asarray(rows, np.float64), params['experts']
  probability = np.asarray(jax.nn.softmax(rows @ params['router']['kernel']))
  total, visits = np.zeros(5), np.zeros(5)
  for row, p in zip(rows, probability):
    chosen = np.argsort(-p)[:2]
    for e in chosen:
      up, gate = (row @ experts[n][e] + experts[f'{n}_bias'][e] for n in ('up', 'gate'))
      out = (np.square(np.maximum(gate, 0)) * up) @ experts['down'][e] + experts['down_bias'][e]
      total[e] += p[e] / p[chosen].sum() * np.linalg.norm(out)
      visits[e] += 1
  assert visits.min() > 0
  assert_allclose(got, total / visits, rtol=1e-4)


def test_the_command_prints_the_parameters_that_are_left(write, call, tmp_path):
  arguments = [f'--workdir={write()}', f'--out={tmp_path / "out"}', '--shrink=layers:3']
  code, out, err = call(command, [*arguments, f'--segments={SEGMENTS}', '--context=8'])
  assert code == 0, err
  before, after = (
    sum(leaf.size for leaf in jax.tree.leaves(load(str(folder)).params))
    for folder in (arguments[0].partition('=')[2], tmp_path / 'out')
  )
  assert f'{after:,} of {before:,} parameters' in out


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ('layers', ["'layers'", 'layers:22']),
    ('layer:3', ["'layer'", "did you mean 'layers'?"]),
    ('layers:0', ['--shrink=layers=0', '1 to 4']),
    ('heads:3', ['--shrink=heads=3', 'a multiple of 2']),
    ('experts:3', ['--shrink=experts=3', 'a model with experts']),
    ('hidden:21', ['--shrink=hidden=21', '1 to 20']),
  ],
)
def test_sizes_that_the_model_cannot_have_are_one_line(given, words, write, call, tmp_path):
  arguments = [f'--workdir={write()}', f'--out={tmp_path / "out"}', f'--shrink={given}']
  code, out, err = call(command, arguments)
  assert code == 2 and not out and err.count('\n') == 1, err
  assert all(word in err for word in words), err
  assert not (tmp_path / 'out').exists()


def test_models_that_cannot_shrink_are_one_line(write, tmp_path):
  for folder, sizes, words in (
    (write(masked=True), {'layers': 2}, 'holds a pruned model'),
    (write(mlp__name='moe_topk'), {'hidden': 8}, 'are experts'),
    (write(attention__name='sliding_window', attention__layers='1:'), {'layers': 2}, 'different'),
  ):
    with pytest.raises(UserError, match=words):
      smaller.shrink(str(folder), str(tmp_path / 'out'), sizes, {}, SEGMENTS)
  assert not (tmp_path / 'out').exists()
