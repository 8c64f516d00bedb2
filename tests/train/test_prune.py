"""Pruning a trained model layer by layer, and the command that does it."""

import dataclasses
import json
import pathlib
import shutil
from typing import ClassVar

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import sparse_lm.prune as prune_command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.embed import Embed
from sparse_lm.layers.linear import Norm
from sparse_lm.layers.sow import SOWN
from sparse_lm.methods.weight.wanda import Wanda
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import setup as setups
from sparse_lm.runs.build import build
from sparse_lm.runs.evaluate import evaluate
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.train import layerwise, one_shot
from sparse_lm.weights.traits import Traits

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, CONTEXT, SEGMENTS = 20, 16, 6
PRUNABLE = [
  f'block_{layer}/{name}/kernel'
  for layer in (0, 1)
  for name in (*(f'attention/{n}' for n in ('key', 'out', 'query', 'value')), 'mlp/down', 'mlp/up')
]


@pytest.fixture(scope='module')
def parent(tiny_config, tmp_path_factory):
  """The workdir of a trained dense model of two layers."""
  workdir = tmp_path_factory.mktemp('parent')
  train(tiny_config(model__layers=2, train__steps=STEPS), str(workdir), progress=False)
  return workdir


@pytest.fixture(scope='module')
def trained(parent):
  return load(str(parent))


@pytest.fixture(scope='module')
def tokens(trained):
  return setup(trained.config).data.tokens['train'][: SEGMENTS * CONTEXT].reshape(SEGMENTS, -1)


MODELS = {
  'tied': {
    'model__tied': True,
    'model__bias': True,
    'model__norm': 'layernorm',
    'model__positions': 'learned',
    'attention__name': 'topk_keys',
    'attention__k': 4,
    'attention__layers': ':1',
  },
  'routers': {'depth__name': 'mixture_of_depths', 'depth__layers': '1:', 'mlp__name': 'moe_topk'},
  'expert choice': {'mlp__name': 'expert_choice', 'activation__name': 'topk'},
}


@pytest.mark.parametrize('case', MODELS)
def test_layers_one_after_another_are_the_model(case, tiny_config):
  model = lm.from_config(tiny_config(model__layers=2, **MODELS[case]), vocab=11)
  draw = np.random.default_rng(0)
  tokens = draw.integers(11, size=(2, CONTEXT)).astype(np.int32)
  shapes = plan_of(model).variables
  variables = jax.tree.map(
    lambda a: draw.normal(0.3 * (a.ndim == 1), 0.3, a.shape).astype(a.dtype),
    {name: shapes[name] for name in shapes if name not in SOWN},
  )
  params, state = variables['params'], {k: v for k, v in variables.items() if k != 'params'}
  want = jax.jit(model.apply)({'params': params, **state}, tokens)
  positions = np.broadcast_to(np.arange(CONTEXT), tokens.shape)
  embed = {'params': params['embed']}
  x = Embed(model.spec).apply(embed, tokens, positions)
  for layer in range(2):
    module = lm.Layer(model.spec, model.slots, layer, model.site)
    names = jax.eval_shape(module.init, jax.random.key(0), x)['params']
    assert set(names) <= {f'block_{layer}', f'depth_{layer}'}
    own = {
      group: {key: values[key] for key in values if key.endswith(f'_{layer}')}
      for group, values in ({'params': params} | state).items()
    }
    moved = jax.jit(module.apply)(own, x)
    assert np.abs(moved - x).max() > 0.01
    x = moved
  x = Norm(model.spec).apply({'params': params['norm']}, x)
  got = Embed(model.spec).apply(embed, x, None, method='predicted')
  assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Recording(Wanda):
  """Wanda that notes every call's signals."""

  traits: ClassVar[Traits] = Traits(needs=('x_sq', 'xtx'))
  seen: ClassVar[list] = []

  def scores(self, trainable, signals):
    self.seen.append({need: tree.named(found) for need, found in signals.items()})
    return super().scores(trainable, signals)


def inputs_of(trained, params, tokens):
  """What each kernel reads, from the outputs of other modules in the whole model."""

  @jax.jit
  def run(params):
    return trained.program.model.apply(
      {'params': params}, tokens, capture_intermediates=True, mutable=['intermediates']
    )

  _, seen = run(params)
  outputs = tree.named(seen['intermediates'])
  found = {}
  for layer in (0, 1):
    at = f'block_{layer}'
    sources = {
      **{f'attention/{name}': 'norm_1' for name in ('query', 'key', 'value')},
      'attention/out': 'attention/attention',
      'mlp/up': 'norm_2',
      'mlp/down': 'mlp/activation',
    }
    for name, source in sources.items():
      x = np.asarray(outputs[f'{at}/{source}/__call__/0'], np.float64)
      found[f'{at}/{name}/kernel'] = x.reshape(tokens.size, -1)
  return found


def pruned_by_hand(params, inputs, layer, fan_in):
  """`params` with one layer's kernels pruned by |W| norm(x), each output alone."""

  def prune(path, w):
    if not path.startswith(f'block_{layer}/') or path not in inputs:
      return w
    scores = np.abs(w) * np.linalg.norm(inputs[path], axis=0)[:, None]
    ranks = np.argsort(np.argsort(-scores, axis=0), axis=0)
    return np.where(ranks < fan_in(len(w)), w, 0)

  return tree.map_named(prune, params)


def test_signals_are_of_the_pruned_layers_before(trained, tokens, tiny_config):
  config = tiny_config(model__layers=2, weight__name='wanda', weight__sparsity=0.75)
  program, target = build(config, trained.tokenizer.vocab_size)
  objective = dataclasses.replace(program.objective, method=Recording(total_steps=STEPS))
  program = dataclasses.replace(program, objective=objective)
  Recording.seen.clear()
  # Batches of four and two.
  trainable, sparse = one_shot.prune(program, trained.params, {}, target, tokens, 4, seed=0)

  dense = inputs_of(trained, trained.params, tokens)
  first = pruned_by_hand(trained.params, dense, 0, lambda n: n // 4)
  after = inputs_of(trained, first, tokens)
  assert len(Recording.seen) == 2
  for layer, inputs in ((0, dense), (1, after)):
    signals = Recording.seen[layer]
    here = [path for path in PRUNABLE if path.startswith(f'block_{layer}/')]
    assert sorted(signals['x_sq']) == sorted(signals['xtx']) == here
    for path in here:
      x = inputs[path]
      close = {'rtol': 1e-3, 'atol': 1e-4 * np.mean(np.square(x)), 'err_msg': path}
      assert_allclose(signals['x_sq'][path], np.mean(np.square(x), axis=0), **close)
      assert_allclose(signals['xtx'][path], x.T @ x / len(x), **close)
  # The test can tell the pruned layer's outputs from the dense one's.
  path = 'block_1/mlp/up/kernel'
  moved = np.mean(np.square(after[path]), axis=0) / np.mean(np.square(dense[path]), axis=0)
  assert np.abs(moved - 1).max() > 0.05

  want = pruned_by_hand(first, after, 1, lambda n: n // 4)
  jax.tree.map(lambda a, b: assert_array_equal(a, b), trainable['params'], want)
  for path, mask in tree.named(sparse.masks).items():
    assert_array_equal(mask, tree.named(want)[path] != 0)


def test_calibration_cuts_distinct_segments_of_the_text():
  text = np.arange(1003, dtype=np.uint16)
  got = layerwise.calibration(text, 30, 10, seed=4)
  assert got.shape == (30, 10) and got.dtype == np.int32
  assert (np.diff(got, axis=1) == 1).all()  # consecutive tokens
  assert len(np.unique(got)) == 300  # that no two segments share
  assert_array_equal(got, layerwise.calibration(text, 30, 10, seed=4))
  assert (got != layerwise.calibration(text, 30, 10, seed=5)).any()
  assert_array_equal(np.sort(layerwise.calibration(text, 100, 10, 0).ravel()), text[:1000])


@pytest.mark.parametrize('segments', [101, 0, -1])
def test_more_segments_than_the_text_has_or_none_are_refused(segments):
  with pytest.raises(UserError) as refused:
    layerwise.calibration(np.zeros(1003, np.uint8), segments, 10, seed=0)
  line = str(refused.value)
  assert f'--segments={segments}: ' in line and 'valid: 1 to 100' in line and '\n' not in line


@pytest.mark.parametrize(
  ('fields', 'missed'),
  [
    ({'mlp__name': 'moe_topk'}, 'block_0/mlp/experts/'),
    ({'weight__dense': ('norm', 'head')}, 'embed/tokens'),
    ({'weight__dense': ('norm', 'embed/tokens')}, 'embed/head/kernel'),
  ],
)
def test_a_parameter_that_no_text_reaches_is_refused_before_anything_is_pruned(
  fields, missed, tiny_config, tokens, monkeypatch
):
  monkeypatch.setattr(Wanda, 'scores', lambda *_: pytest.fail('pruned'))
  config = tiny_config(weight__name='wanda', weight__sparsity=0.5, **fields)
  program, target = build(config, vocab=30)
  state = program.init(0, target)
  with pytest.raises(UserError) as refused:
    one_shot.prune(program, state.trainable['params'], {}, target, tokens, 4, seed=0)
  line = str(refused.value)
  assert missed in line and 'config.weight.dense' in line and '\n' not in line


def test_a_pattern_whose_units_span_layers_is_refused(tiny_config):
  # One layer is pruned at a time: by itself it is always the best of the layers.
  fields = {'weight__name': 'wanda', 'weight__sparsity': 0.5, 'weight__pattern': 'layer'}
  with pytest.raises(UserError, match=r'config\.weight\.pattern'):
    build(tiny_config(model__layers=2, **fields), vocab=30)


@pytest.fixture
def main(call):
  """`main(workdir, out, **overrides) -> (exit code, stdout, stderr)`, in this process."""

  def run(workdir, out, segments=SEGMENTS, **overrides):
    given = [f'--workdir={workdir}', f'--out={out}', f'--segments={segments}']
    given += [f'--config.{name.replace("__", ".")}={value}' for name, value in overrides.items()]
    return call(prune_command, given)

  return run


@pytest.mark.parametrize(
  ('name', 'sparsity', 'pattern', 'group'),
  [
    ('wanda', 0.5, '2:4', 4),
    pytest.param('sparsegpt', 0.7, 'unstructured', None, marks=pytest.mark.slow),
    pytest.param('magnitude', 0.3, 'unstructured', None, marks=pytest.mark.slow),
  ],
)
def test_the_command_writes_a_run_of_exact_density(
  name, sparsity, pattern, group, main, parent, trained, tmp_path
):
  fields = {'weight__name': name, 'weight__sparsity': sparsity, 'weight__pattern': pattern}
  code, out, err = main(parent, tmp_path / 'out', **fields)
  assert code == 0, err
  pruned = load(str(tmp_path / 'out'))
  assert pruned.step == STEPS and pruned.is_sparse and not trained.is_sparse
  masks, params = tree.named(pruned.masks), tree.named(pruned.params)
  assert sorted(masks) == PRUNABLE
  for path, before in tree.named(trained.params).items():
    after = np.asarray(params[path])
    if path not in masks:
      assert_array_equal(after, before)
      continue
    mask = np.asarray(masks[path])
    assert mask.sum() == round(mask.size * (1 - sparsity))
    assert not after[~mask].any() and np.count_nonzero(after) == mask.sum()
    assert (after[mask] == np.asarray(before)[mask]).all() == (name != 'sparsegpt')
    if group:
      assert (mask.reshape(-1, group, mask.shape[1]).sum(axis=1) == group // 2).all()

  result = json.loads((tmp_path / 'out' / 'result.json').read_text())
  metrics = result['metrics']
  loss = evaluate(setup(trained.config), pruned.params, pruned.model_state)['val_loss']
  assert metrics['val_loss'] == pytest.approx(loss, rel=1e-5)
  assert f'validation loss {metrics["val_loss"]:.4f}' in out
  dropped = sum(int((~np.asarray(mask)).sum()) for mask in masks.values())
  share = dropped / sum(mask.size for mask in masks.values())
  assert metrics['sparsity_prunable'] == pytest.approx(share, rel=1e-6)
  assert metrics['prune_seconds'] > 0 and metrics['steps'] == STEPS
  assert result['parent'] == str(parent)
  costs = pruned.costs()
  assert {key: metrics[key] for key in costs} == costs
  assert result['config']['weight']['name'] == name == pruned.config.weight.name


WANDA = {'weight__name': 'wanda', 'weight__sparsity': 0.5}
ABLE = 'alps, magnitude, snip, sparsegpt, wanda'
BAD = {
  'a field outside the weights': ({**WANDA, 'model__width': 32}, ['config.model.width']),
  'a method that trains': ({'weight__name': 'rigl', 'weight__sparsity': 0.5}, ["'rigl'", ABLE]),
  'no method': ({}, ["'none'", ABLE]),
  'unknown method': ({'weight__name': 'wando'}, ["'wanda'"]),
  'a field of another method': ({**WANDA, 'weight__damp': 0.1}, ['config.weight.damp']),
  'sparsity 1': ({**WANDA, 'weight__sparsity': 1.0}, ['config.weight.sparsity', '[0, 1)']),
  'pattern': (
    {**WANDA, 'weight__name': 'sparsegpt', 'weight__pattern': 'row'},
    ['config.weight.pattern', 'N:M'],
  ),
  'segments': ({**WANDA, 'segments': 10**6}, ['--segments=1000000', 'valid: 1 to ']),
  'unreached': (
    {**WANDA, 'weight__pattern': 'unstructured', 'weight__dense': "('norm',)"},
    ['embed/', 'config.weight.dense'],
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_and_leaves_no_folder(case, main, parent, tmp_path):
  given, expected = BAD[case]
  code, out, err = main(parent, tmp_path / 'out', **given)
  assert code == 2 and not out
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert all(part in err for part in expected), err
  assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_refused(main, tmp_path):
  (tmp_path / 'empty').mkdir()
  for workdir in (tmp_path / 'none', tmp_path / 'empty'):
    code, _, err = main(workdir, tmp_path / 'out', **WANDA)
    assert code == 2 and err.count('\n') == 1 and f'{workdir} holds no run' in err
  assert not (tmp_path / 'out').exists()


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_pruned(main, tmp_path):
  (tmp_path / 'file').write_text('')
  code, _, err = main(tmp_path / 'none', tmp_path / 'file' / 'out', **WANDA)
  assert code == 2 and err.count('\n') == 1 and f'{tmp_path}/file is not a writable folder' in err


def test_a_changed_text_is_noticed_before_anything_is_pruned(main, parent, text_file, tmp_path):
  text = text_file.read_text()
  try:
    text_file.write_text(
      text.replace('river', 'revir')
    )  # the same characters, so the same tokenizer
    setups._load_data.cache_clear()
    code, out, err = main(parent, tmp_path / 'out', **WANDA)
  finally:
    text_file.write_text(text)
    setups._load_data.cache_clear()
  assert code == 2 and not out and err.count('\n') == 1
  assert f'--workdir={parent} holds a run on other text' in err
  assert not (tmp_path / 'out').exists()


def files(folder):
  return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}


@pytest.mark.parametrize('finished', [True, False])
def test_a_folder_that_holds_a_run_is_never_written_to(finished, main, parent, tmp_path):
  out = pathlib.Path(shutil.copytree(parent, tmp_path / 'out'))
  if not finished:
    (out / 'result.json').unlink()
  before = files(out)
  for workdir in (parent, out):
    code, _, err = main(workdir, out, **WANDA)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert str(out) in err and files(out) == before


def test_a_magnitude_run_that_has_not_finished_is_not_pruned_onto_itself(
  main, tiny_config, train_until, tmp_path
):
  config = tiny_config(weight__name='magnitude', weight__sparsity=0.5)
  train_until(config, tmp_path / 'run', 3)
  before = files(tmp_path / 'run')
  code, _, err = main(tmp_path / 'run', tmp_path / 'run')
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
  assert files(tmp_path / 'run') == before


@pytest.mark.parametrize('name', ['wanda', 'sparsegpt'])
def test_training_with_a_one_shot_method_points_to_the_command(name, tiny_config, tmp_path):
  config = tiny_config(weight__name=name, weight__sparsity=0.5)
  with pytest.raises(UserError) as refused:
    train(config, str(tmp_path / 'run'), progress=False)
  line = str(refused.value)
  assert f"config.weight.name='{name}'" in line and 'python -m sparse_lm.prune' in line
  assert '\n' not in line and not (tmp_path / 'run').exists()
