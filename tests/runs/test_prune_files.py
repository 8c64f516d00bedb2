"""Pruning of weight files, layer by layer, against the pruning of the same model in memory."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm import prune as command
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.prune import prune
from sparse_lm.runs import configs, prune_files
from sparse_lm.runs.build import build
from sparse_lm.runs.loop import train
from sparse_lm.runs.prune_files import PLAN
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS
from sparse_lm.runs.setup import setup
from sparse_lm.runs.trained import load
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import write_json
from sparse_lm.train import layerwise, one_shot

SEGMENTS, CONTEXT, LAYERS = 6, 16, 3
WANDA = {'weight.name': 'wanda', 'weight.sparsity': 0.5}


@pytest.fixture(scope='module')
def trained(tiny_config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config(model__layers=LAYERS, train__steps=2)
  train(config, str(workdir), progress=False)
  return load(str(workdir))


@pytest.fixture(scope='module')
def imported(trained, without_text, tmp_path_factory):
  """The same model as a workdir with weight files and no text, as convert writes it."""
  return without_text(trained, tmp_path_factory.mktemp('imported'))


@pytest.fixture(scope='module')
def text(text_file):
  return {'data.path': str(text_file)}


def in_memory(trained, overrides):
  """Parameters and masks of the model that is pruned in memory on the same sequences."""
  config = configs.derive(trained.config, overrides, allowed=('weight',))
  program, target = build(config, trained.tokenizer.vocab_size)
  ids = setup(trained.config).data.tokens['train']
  tokens = layerwise.calibration(ids, SEGMENTS, CONTEXT, config.seed)
  trainable, sparse = one_shot.prune(
    program, trained.params, {}, target, tokens, SEGMENTS, config.seed
  )
  return trainable['params'], sparse.masks


@pytest.mark.parametrize(
  'fields',
  [
    WANDA,
    {'weight.name': 'sparsegpt', 'weight.sparsity': 0.5, 'weight.pattern': '2:4'},
    pytest.param({'weight.name': 'magnitude', 'weight.sparsity': 0.3}, marks=pytest.mark.slow),
    pytest.param(WANDA | {'weight.pattern': 'neuron'}, marks=pytest.mark.slow),
  ],
)
def test_weights_are_those_of_the_model_in_memory(fields, trained, imported, text, tmp_path):
  out = tmp_path / 'out'
  result = prune(str(imported), str(out), fields | text, SEGMENTS, CONTEXT)
  params, masks = in_memory(trained, fields)
  pruned = load(str(out))
  for path, mask in tree.named(masks).items():
    assert_array_equal(tree.named(pruned.masks)[path], mask, err_msg=path)
  for path, leaf in tree.named(params).items():
    assert_allclose(tree.named(pruned.params)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
  assert tree.named(pruned.masks).keys() == tree.named(masks).keys()
  sizes = [(m.size, m.sum()) for m in map(np.asarray, tree.named(masks).values())]
  dropped = 1 - sum(kept for _, kept in sizes) / sum(size for size, _ in sizes)
  assert result['metrics']['sparsity_prunable'] == pytest.approx(dropped)
  written = json.loads((out / 'result.json').read_text())
  assert result['metrics'] == written['metrics'] and written['parent'] == str(imported)
  assert not (out / PLAN).exists() and pruned.config.weight.name == fields['weight.name']
  assert (out / 'tokenizer.json').read_bytes() == (imported / 'tokenizer.json').read_bytes()


class Killed(Exception):
  """Stands for the end of the process."""


def test_a_killed_process_is_continued_by_the_same_command_alone(
  imported, text, tmp_path, monkeypatch
):
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  fields = WANDA | {'weight.pattern': 'unstructured', 'weight.distribution': 'owl:2:0.1'} | text
  prune(str(imported), str(whole), fields, SEGMENTS, CONTEXT)
  write, written = WeightFiles.write, []

  def write_two(self, part, params, masks):
    if len(written) == 2:
      raise Killed
    write(self, part, params, masks)
    written.append(part)

  with monkeypatch.context() as patch:
    patch.setattr(WeightFiles, 'write', write_two)
    with pytest.raises(Killed):
      prune(str(imported), str(out), fields, SEGMENTS, CONTEXT)
  assert written == [None, 0]
  with pytest.raises(UserError, match='holds no run'):
    load(str(out))
  for change, segments, words in (
    ({'weight.sparsity': 0.4}, SEGMENTS, ['config.weight.sparsity=0.5, not 0.4', 'a new folder']),
    ({}, SEGMENTS - 1, ['other calibration text', '--segments']),
  ):
    with pytest.raises(UserError) as refused:
      prune(str(imported), str(out), fields | change, segments, CONTEXT)
    assert all(word in str(refused.value) for word in words), refused.value
  written.clear()
  monkeypatch.setattr(
    WeightFiles, 'write', lambda self, part, *rest: (written.append(part), write(self, part, *rest))
  )
  # Outliers that were measured are not measured again.
  monkeypatch.setattr(prune_files.measured, 'as_maps', lambda *_: pytest.fail('measured again'))
  prune(str(imported), str(out), fields, SEGMENTS, CONTEXT)
  assert written == [1, 2]
  for file in (whole / WEIGHTS).glob('*.safetensors'):
    assert file.read_bytes() == (out / WEIGHTS / file.name).read_bytes(), file.name
  assert load(str(out)).config == load(str(whole)).config
  with pytest.raises(UserError, match='already exists'):
    prune(str(imported), str(out), fields, SEGMENTS, CONTEXT)


BAD = {
  'no text': (WANDA, {}, ['config.data.path']),
  'context': (WANDA, {'context': 99}, ['--context=99', '1 to 16']),
  'segments': (WANDA, {'segments': 10**6, 'text': True}, ['--segments=1000000', 'valid: 1 to ']),
  'gradients': (
    {'weight.name': 'snip', 'weight.sparsity': 0.5},
    {},
    ['SNIP', 'one layer at a time'],
  ),
  'all layers': (
    {'weight.name': 'magnitude', 'weight.sparsity': 0.5, 'weight.pattern': 'global'},
    {},
    ['Magnitude ranks units of several layers'],
  ),
  'a method that trains': ({'weight.name': 'rigl', 'weight.sparsity': 0.5}, {}, ["'rigl'", 'alps']),
  'no signal': (
    WANDA | {'weight.dense': ('norm',), 'weight.pattern': 'unstructured'},
    {'text': True},
    ['signal for embed/'],
  ),
  'no outliers': (
    {'weight.name': 'magnitude', 'weight.sparsity': 0.5, 'weight.dense': ('norm',)}
    | {'weight.distribution': 'owl:2:0.1'},
    {'text': True},
    ['signal for embed/'],
  ),
  'another field': (WANDA | {'model.width': 32}, {}, ['config.model.width']),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line_and_leaves_no_folder(case, imported, text, call, tmp_path):
  fields, given, words = BAD[case]
  fields = fields | (text if given.get('text') else {})
  arguments = [f'--workdir={imported}', f'--out={tmp_path / "out"}']
  arguments += [f'--segments={given.get("segments", SEGMENTS)}']
  arguments += [f'--context={given.get("context", CONTEXT)}']
  arguments += [f'--config.{field}={value}' for field, value in fields.items()]
  code, out, err = call(command, arguments)
  assert code == 2 and not out and err.count('\n') == 1, err
  assert all(word in err for word in words), err
  assert not list(tmp_path.iterdir())


def test_a_pruned_model_is_not_pruned_again(imported, tmp_path):
  fields = {'weight.name': 'magnitude', 'weight.sparsity': 0.5}
  prune(str(imported), str(tmp_path / 'once'), fields)
  with pytest.raises(UserError, match='holds a pruned model; valid: the dense model that it was'):
    prune(str(tmp_path / 'once'), str(tmp_path / 'twice'), fields)
  assert not (tmp_path / 'twice').exists()


def test_files_of_another_model_are_refused(imported, text, tmp_path):
  folder = pathlib.Path(shutil.copytree(imported, tmp_path / 'copy'))
  config = json.loads((folder / CONFIG).read_text())
  config['model']['hidden'] = 24
  del config['content_sha256']
  write_json(folder / CONFIG, config)
  with pytest.raises(
    UserError, match=r'does not fit .*block_0/mlp/.* valid: the folder as convert'
  ):
    prune(str(folder), str(tmp_path / 'out'), WANDA | text, SEGMENTS, CONTEXT)
