"""Weights in one file a layer against the trees that were written, and the library's own reader."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tensor_files import open_tensors
from sparse_lm.runs.loop import train
from sparse_lm.runs.trained import load
from sparse_lm.runs.weight_files import INDEX, WeightFiles
from sparse_lm.train.work import Work

LAYERS = 2


def _model(seed=0):
  """Parameters and masks by part; layer 0 has a mask of 15 bits, layer 1 weights in bfloat16."""
  draw = np.random.default_rng(seed)
  mask = draw.random((5, 3)) < 0.5
  kernel = np.where(mask, draw.normal(size=(5, 3)), 0).astype(np.float32)
  coarse = draw.normal(size=(4,)).astype(ml_dtypes.bfloat16)
  return {
    None: ({'embed': {'tokens': draw.normal(size=(7, 5))}}, {'embed': {'tokens': None}}),
    0: ({'block_0': {'up': {'kernel': kernel}}}, {'block_0': {'up': {'kernel': mask}}}),
    1: ({'block_1': {'norm': {'scale': coarse}}}, {'block_1': {'norm': {'scale': None}}}),
  }


@pytest.fixture
def folder(tmp_path):
  """A finished folder of `_model()`."""
  files = WeightFiles(tmp_path / 'weights', LAYERS)
  for part, (params, masks) in _model().items():
    files.write(part, params, masks)
  files.finish('a test', 7, Work(3.0, 4.0))
  return tmp_path / 'weights'


def test_what_is_read_is_what_was_written(folder):
  files = WeightFiles(folder)
  assert (files.layers, files.source, files.step, files.work) == (2, 'a test', 7, Work(3.0, 4.0))
  assert files.parts == [None, 0, 1] and files.missing() == []
  for part, (params, masks) in _model().items():
    for got, want in zip(files.read(part), (params, masks)):
      assert jax.tree.structure(got) == jax.tree.structure(want)
      jax.tree.map(assert_array_equal, got, want)
      assert [a.dtype for a in jax.tree.leaves(got)] == [a.dtype for a in jax.tree.leaves(want)]
  whole, masks = files.read_all()
  assert set(whole) == {'embed', 'block_0', 'block_1'} and set(tree.named(masks)) == {
    'block_0/up/kernel'
  }


def test_the_library_reads_the_same_arrays(folder):
  for path in folder.glob('*.safetensors'):
    theirs, ours = load_file(path), open_tensors(path).arrays
    assert theirs.keys() == ours.keys()
    for name, array in theirs.items():
      assert_array_equal(ours[name], array)
      assert ours[name].dtype == array.dtype


def test_a_process_that_was_killed_continues_with_the_missing_parts(tmp_path):
  parts = _model()
  first = WeightFiles(tmp_path / 'weights', LAYERS)
  assert first.missing() == [None, 0, 1]
  first.write(0, *parts[0])
  with pytest.raises(UserError, match='not complete'):
    WeightFiles(tmp_path / 'weights').read(0)
  second = WeightFiles(tmp_path / 'weights', LAYERS)
  assert second.missing() == [None, 1]
  assert_array_equal(
    second.read(0)[0]['block_0']['up']['kernel'], parts[0][0]['block_0']['up']['kernel']
  )
  with pytest.raises(ValueError, match='not written'):
    second.finish('a test')
  for part in second.missing():
    second.write(part, *parts[part])
  second.finish('a test')
  assert WeightFiles(tmp_path / 'weights').missing() == []
  with pytest.raises(ValueError, match='block_0/up/kernel does not belong'):
    second.write(1, *parts[0])


@pytest.mark.parametrize('at', [0, 9, 200, -1])
@pytest.mark.parametrize('name', ['outside.safetensors', 'layer_000.safetensors', INDEX])
def test_a_flipped_bit_ends_in_one_line(folder, name, at):
  data = bytearray((folder / name).read_bytes())
  data[at] ^= 1
  (folder / name).write_bytes(data)
  with pytest.raises(UserError) as raised:
    WeightFiles(folder).read_all()
  assert name in str(raised.value) and '\n' not in str(raised.value)


def test_missing_cut_and_exchanged_files_end_in_one_line(folder):
  other = WeightFiles(folder.parent / 'other', LAYERS)
  for part, (params, masks) in _model(1).items():
    other.write(part, params, masks)
  shutil.copy(folder.parent / 'other' / 'layer_001.safetensors', folder)
  with pytest.raises(UserError, match=r'layer_001\.safetensors is damaged \(its digests'):
    WeightFiles(folder).read(1)
  path = folder / 'layer_000.safetensors'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match=r'layer_000\.safetensors is damaged'):
    WeightFiles(folder).read(0)
  path.write_bytes(b'')
  with pytest.raises(UserError, match=r'layer_000\.safetensors cannot be read'):
    WeightFiles(folder).read(0)
  path.unlink()
  with pytest.raises(UserError, match=r'layer_000\.safetensors cannot be read'):
    WeightFiles(folder).read(0)


def test_an_unknown_dtype_is_named(tmp_path):
  header = {'a': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}
  text = json.dumps(header).encode()
  (tmp_path / 'a').write_bytes(len(text).to_bytes(8, 'little') + text + b'\0')
  with pytest.raises(UserError, match='tensor a has the dtype F8_E4M3'):
    open_tensors(tmp_path / 'a')


@pytest.mark.parametrize('sparse', [False, True])
def test_a_run_loads_from_weight_files_as_from_its_checkpoint(tiny_config, tmp_path, sparse):
  fields = {'weight__name': 'static', 'weight__sparsity': 0.5} if sparse else {}
  train(tiny_config(train__steps=2, **fields), str(tmp_path / 'a'), progress=False)
  before = load(str(tmp_path / 'a'))
  shutil.copytree(tmp_path / 'a', tmp_path / 'b', ignore=shutil.ignore_patterns('checkpoints'))
  files = WeightFiles(tmp_path / 'b' / 'weights', 1)
  for part in files.parts:
    inside = lambda tree: {k: v for k, v in tree.items() if k.startswith('block_') == (part == 0)}  # noqa: B023, E731
    files.write(part, inside(before.params), inside(before.masks))
  files.finish('a test', before.step, before.work)
  after = load(str(tmp_path / 'b'))
  for got, want in ((after.params, before.params), (after.masks, before.masks)):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(assert_array_equal, got, want)
  jax.tree.map(assert_array_equal, after.target, before.target)
  assert (after.step, after.work, after.is_sparse) == (2, before.work, sparse)
  assert after.source == f'{tmp_path / "b"}: a test' and after.costs() == before.costs()
  tokens = np.zeros((1, 3), np.int32)
  assert_array_equal(after.logits(tokens), before.logits(tokens))
  params, masks = files.read(0)
  params['block_0']['mlp'].pop('up'), masks['block_0']['mlp'].pop('up')
  files.write(0, params, masks)
  files.finish('a test')
  with pytest.raises(UserError, match=r'block_0/mlp/up/kernel is missing there and \(16, 32\)'):
    load(str(tmp_path / 'b'))
