"""Folders that cannot be converted end in one line, and nothing is written."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_lm.convert import __main__ as convert_command
from sparse_lm.convert.importing import convert
from sparse_lm.core.errors import UserError

MODELS = pathlib.Path(__file__).parent / 'models'


@pytest.fixture
def folder(tmp_path):
  """`folder(name)`: a copy of a stored model."""

  def copy(name='llama3'):
    shutil.copytree(MODELS / name, tmp_path / name)
    return tmp_path / name

  return copy


def refused(folder, message, **options):
  with pytest.raises(UserError, match=message) as raised:
    convert(str(folder), str(folder.parent / 'out'), **options)
  assert '\n' not in str(raised.value)
  assert not (folder.parent / 'out').exists() and not list(folder.parent.glob('.incomplete*'))


def change(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# Every field of a foreign config that would change what the model computes, and is not computed here.
FIELDS = [
  ('llama3', {'model_type': 'mamba'}, r"model_type 'mamba': .*gpt2, gpt_neox, llama"),
  ('llama3', {'hidden_act': 'mish'}, r"hidden_act 'mish'"),
  ('llama3', {'mlp_bias': True}, 'mlp_bias=True'),
  ('llama3', {'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0}}, "rope_type='yarn'"),
  ('llama3', {'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 1.5}}, 'has no factor'),
  ('llama3', {'rope_parameters': None, 'rope_scaling': {'type': 'dynamic'}}, "rope_type='dynamic'"),
  ('llama3', {'rope_interleaved': True}, 'rope_interleaved=True'),
  ('llama3', {'residual_multiplier': 0.22}, r'field residual_multiplier=0\.22'),
  ('llama3', {'quantization_config': {'quant_method': 'gptq'}}, r'quantization_config \(gptq\)'),
  ('llama3', {'num_attention_heads': 'six'}, "num_attention_heads is 'six'"),
  ('llama3', {'hidden_size': None}, 'has no hidden_size'),
  ('llama3', {'num_key_value_heads': 4}, 'kv_heads=4 does not divide'),
  ('llama3', {'intermediate_size': 27}, r'mlp\.\w+_proj\.weight has the shape .* describes'),
  ('llama3', {'num_hidden_layers': 3}, r'no tensor layers\.2\.'),
  ('llama3', {'num_hidden_layers': 1}, r'tensor model\.layers\.1\.\S+ has no place'),
  ('llama3', {'vocab_size': 62}, r'embed_tokens\.weight has the shape \[61, 24\]'),
  ('qwen2', {'use_sliding_window': True}, 'use_sliding_window=True'),
  ('qwen3', {'layer_types': ['full_attention', 'sliding_attention']}, "'sliding_attention'"),
  ('mixtral', {'sliding_window': 16}, 'sliding_window=16'),
  ('olmoe', {'clip_qkv': 8.0}, r'clip_qkv=8\.0'),
  ('mixtral', {'num_experts_per_tok': 1}, 'num_experts_per_tok=1 .* 2 or more'),
  ('olmoe', {'num_experts_per_tok': 1, 'norm_topk_prob': True}, 'num_experts_per_tok=1'),
  ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
  ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights=False'),
]


@pytest.mark.parametrize(('name', 'fields', 'message'), FIELDS)
def test_fields_that_are_not_computed_are_named(folder, name, fields, message):
  path = folder(name)
  change(path / 'config.json', **fields)
  refused(path, message)


def test_missing_and_damaged_files(folder):
  path = folder('qwen3')
  shard = path / 'model-00002-of-00006.safetensors'
  data = shard.read_bytes()
  shard.write_bytes(data[:-4])
  refused(path, r'model-00002-of-00006\.safetensors is damaged')
  shard.unlink()
  refused(path, r'has no model-00002-of-00006\.safetensors')
  (path / 'model.safetensors.index.json').unlink()
  refused(path, r'has no model\.safetensors;')
  (path / 'config.json').write_text('{')
  refused(path, r'config\.json is damaged')
  (path / 'config.json').unlink()
  refused(path, r'has no config\.json; valid: a folder of Hugging Face, or a \.gguf file')
  shutil.rmtree(path)
  path.write_text('')
  refused(path, 'is not a folder')


def test_a_tensor_that_is_missing_from_its_shard_or_has_no_place(folder):
  path = folder()
  file = path / 'model.safetensors'
  arrays = load_file(file)
  save_file(arrays | {'model.layers.0.mlp.extra': np.zeros(3, np.float32)}, file)
  refused(path, r'model\.layers\.0\.mlp\.extra has no place')
  save_file(arrays | {'model.layers.0.self_attn.rotary_emb.inv_freq': np.zeros(3)}, file)
  convert(str(path), str(path.parent / 'with_buffer'))
  arrays.pop('lm_head.weight')
  save_file(arrays, file)
  refused(path, r'no tensor lm_head\.weight')


def test_tokenizers_that_do_not_fit(folder):
  path = folder()
  change(path / 'tokenizer.json', model={'type': 'WordLevel', 'vocab': {}, 'unk_token': 'w2'})
  refused(path, 'has no vocabulary')
  words = {f'w{i}': i for i in range(70)}
  change(path / 'tokenizer.json', model={'type': 'WordLevel', 'vocab': words, 'unk_token': 'w2'})
  refused(path, 'ids up to 71, and the model has 61 rows')
  change(path / 'tokenizer.json', model={'type': 'Unknown', 'vocab': words})
  refused(path, 'the tokenizer cannot be read')
  (path / 'tokenizer.json').unlink()
  refused(path, r'has no tokenizer\.json')


def test_a_context_beyond_the_positions(folder):
  path = folder()
  refused(path, '--context=41 is not valid for this model; valid: 1 to 40', context=41)
  assert convert(str(path), str(path.parent / 'short'), context=7).config.data.context == 7
  learned = folder('gpt2')
  refused(learned, '--context=7 .* 24, the number of its learned positions', context=7)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'one of the arguments --from --workdir is required'),
    (['--workdir=a'], 'needs one of --to and --upcycle'),
    (['--workdir=a', '--to=hf', '--upcycle=experts:8,k:2'], 'needs one of --to and --upcycle'),
    (['--from=a', '--to=hf'], 'read a workdir'),
    (['--workdir=a', '--to=hf', '--context=8'], '--dtype and --context are of --from'),
    (['--from=a', '--dtype=int8'], "'int8'"),
    (['--workdir=a', '--to=hf'], 'workdir a holds no run'),
  ],
)
def test_arguments(call, tmp_path, arguments, message):
  code, out, err = call(convert_command, [*arguments, f'--out={tmp_path / "out"}'])
  assert code == 2 and not out and re.search(message, err), err
  assert err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_a_damaged_special_token_is_refused(folder):
  path = folder()
  change(path / 'tokenizer.json', added_tokens=[{'content': '<s>'}])
  refused(path, r"tokenizer\.json is damaged \(added_tokens\[0\] has no 'id'\)")


@pytest.mark.parametrize(
  ('name', 'left_out', 'field', 'default'),
  [
    ('mixtral', 'rms_norm_eps', 'norm_epsilon', 1e-5),
    ('olmoe', 'rms_norm_eps', 'norm_epsilon', 1e-5),
    ('llama3', 'rms_norm_eps', 'norm_epsilon', 1e-6),
    ('mixtral', 'rope_theta', 'rope_base', 1e6),
  ],
)
def test_a_field_that_is_left_out_has_the_default_of_its_family(
  folder, name, left_out, field, default
):
  path = folder(name)
  config = json.loads((path / 'config.json').read_text())
  for fields in (config, config.get('rope_parameters') or {}):
    fields.pop(left_out, None)
  (path / 'config.json').write_text(json.dumps(config))
  made = convert(str(path), str(path.parent / 'out'))
  assert made.config.model[field] == default
