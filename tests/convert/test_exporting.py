"""Models that were imported, written again, and compared tensor by tensor with the originals."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_array_equal
from safetensors.numpy import load_file

from sparse_lm.convert import __main__ as convert_command
from sparse_lm.convert import exporting
from sparse_lm.convert.exporting import export
from sparse_lm.convert.importing import convert
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs.loop import train
from sparse_lm.runs.run_folder import WEIGHTS
from sparse_lm.runs.trained import load
from sparse_lm.runs.weight_files import WeightFiles

MODELS = pathlib.Path(__file__).parent / 'models'
NAMES = sorted(path.name for path in MODELS.iterdir())


def tensors(folder):
  """All tensors of a folder of Hugging Face, read by the library."""
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    found |= load_file(file)
  return found


@pytest.mark.parametrize('name', NAMES)
def test_a_model_comes_out_as_it_went_in(name, tmp_path):
  convert(str(MODELS / name), str(tmp_path / 'in'))
  done = export(str(tmp_path / 'in'), str(tmp_path / 'out'))
  before, after = tensors(MODELS / name), tensors(tmp_path / 'out')
  assert before.keys() == after.keys()
  for key, array in before.items():
    assert_array_equal(after[key], array)
    assert after[key].dtype == array.dtype
  config = [
    json.loads((folder / 'config.json').read_text()) for folder in (MODELS / name, tmp_path / 'out')
  ]
  assert config[0]['architectures'] == config[1]['architectures'] and done.tokenizer
  for key in ('model_type', 'vocab_size', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings'):
    assert config[0][key] == config[1][key]
  words = [
    json.loads((f / 'tokenizer.json').read_text()) for f in (MODELS / name, tmp_path / 'out')
  ]
  assert words[0] == words[1]
  # What is written is read again as the same model.
  convert(str(tmp_path / 'out'), str(tmp_path / 'again'))
  one, two = load(str(tmp_path / 'in')), load(str(tmp_path / 'again'))
  assert one.config == two.config
  for path, leaf in tree.named(one.params).items():
    assert_array_equal(leaf, tree.named(two.params)[path])


def test_shards_hold_whole_layers_and_have_an_index(tmp_path, monkeypatch):
  monkeypatch.setattr(exporting, 'SHARD', 20_000)
  convert(str(MODELS / 'llama3'), str(tmp_path / 'in'))
  export(str(tmp_path / 'in'), str(tmp_path / 'out'))
  index = json.loads((tmp_path / 'out' / 'model.safetensors.index.json').read_text())
  files = sorted(path.name for path in (tmp_path / 'out').glob('*.safetensors'))
  assert files == [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)]
  assert index['weight_map'].keys() == tensors(MODELS / 'llama3').keys()
  for name, file in index['weight_map'].items():
    assert name in load_file(tmp_path / 'out' / file)
  convert(str(tmp_path / 'out'), str(tmp_path / 'again'))


def test_dropped_weights_are_exact_zeros(tmp_path):
  convert(str(MODELS / 'llama3'), str(tmp_path / 'in'))
  files = WeightFiles(tmp_path / 'in' / WEIGHTS, 2)
  params, masks = files.read(1)
  kernel = params['block_1']['mlp']['up']['kernel']
  mask = np.arange(kernel.size).reshape(kernel.shape) % 3 > 0
  params['block_1']['mlp']['up']['kernel'] = np.where(mask, kernel, 0)
  masks['block_1']['mlp']['up']['kernel'] = mask
  files.write(1, params, masks)
  files.finish('a test')
  export(str(tmp_path / 'in'), str(tmp_path / 'out'))
  found = tensors(tmp_path / 'out')['model.layers.1.mlp.up_proj.weight']
  assert_array_equal(found == 0, ~mask.T)


def test_a_bpe_is_written_as_a_tokenizer_of_hugging_face(tiny_config, tmp_path):
  llama = {'mlp__name': 'gated', 'activation__name': 'silu'}
  bpe = {'data__tokenizer': 'bpe', 'data__vocab_size': 280}
  train(tiny_config(train__steps=1, **llama, **bpe), str(tmp_path / 'run'), progress=False)
  assert export(str(tmp_path / 'run'), str(tmp_path / 'out')).tokenizer
  library = tokenizers.Tokenizer.from_file(str(tmp_path / 'out' / 'tokenizer.json'))
  convert(str(tmp_path / 'out'), str(tmp_path / 'again'))
  ours, again = (load(str(tmp_path / name)).tokenizer for name in ('run', 'again'))
  text = 'def f(x):\n  return x  # größer\0\nimport numpy'
  assert_array_equal(ours.encode(text), library.encode(text).ids)
  assert_array_equal(ours.encode(text), again.encode(text))


def test_a_trained_run_is_written_if_a_family_computes_it(tiny_config, tmp_path, call):
  llama = {'mlp__name': 'gated', 'activation__name': 'silu', 'model__kv_heads': 1}
  train(tiny_config(train__steps=1, **llama), str(tmp_path / 'run'), progress=False)
  arguments = [f'--workdir={tmp_path / "run"}', '--to=hf', f'--out={tmp_path / "out"}']
  code, out, err = call(convert_command, arguments)
  assert code == 0 and 'llama' in out and 'without a tokenizer' in out, err
  params = tree.named(load(str(tmp_path / 'run')).params)
  found = tensors(tmp_path / 'out')
  assert_array_equal(
    found['model.layers.0.self_attn.k_proj.weight'], params['block_0/attention/key/kernel'].T
  )
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['vocab_size'] == found['model.embed_tokens.weight'].shape[0]
  train(
    tiny_config(train__steps=1, activation__name='silu'), str(tmp_path / 'other'), progress=False
  )
  with pytest.raises(UserError, match=r'no family .* differs in config\.'):
    export(str(tmp_path / 'other'), str(tmp_path / 'no'))
  assert not (tmp_path / 'no').exists()
