"""GGUF files against the same model in a Hugging Face folder, and the words of their tokenizers."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

from sparse_lm.convert import gguf_tokenizer
from sparse_lm.convert.importing import convert
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.runs import runnable

gguf = pytest.importorskip('gguf')
MODELS = pathlib.Path(__file__).parent / 'models'
NAMES = {
  'embed_tokens': 'token_embd',
  'norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'q_proj': 'attn_q',
  'k_proj': 'attn_k',
  'v_proj': 'attn_v',
  'o_proj': 'attn_output',
  'q_norm': 'attn_q_norm',
  'k_norm': 'attn_k_norm',
  'gate_proj': 'ffn_gate',
  'up_proj': 'ffn_up',
  'down_proj': 'ffn_down',
}


def stored(name):
  """The tensors of a stored model, and its config."""
  folder = MODELS / name
  found = {k: v for file in folder.glob('*.safetensors') for k, v in load_file(file).items()}
  return found, json.loads((folder / 'config.json').read_text())


def permuted(rows, heads):
  """What llama.cpp's converter does to the rows of queries and keys, row by row."""
  out, size = np.empty_like(rows), rows.shape[0] // heads
  for head in range(heads):
    for pair in range(size // 2):
      for half in (0, 1):
        source = head * size + half * (size // 2) + pair
        out[head * size + 2 * pair + half] = rows[source]
  return out


def write(path, name, change=lambda writer: None, kind=None):
  """Writes a stored model as a GGUF file, with the words of a tiny byte-level vocabulary."""
  arrays, config = stored(name)
  arch = config['model_type']
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_key_length(config['head_dim'])
  writer.add_value_length(config['head_dim'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  writer.add_rope_freq_base(config['rope_parameters']['rope_theta'])
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('qwen2')
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = ['<s>', *alphabet[: config['vocab_size'] - 3], '!"', '</s>']
  writer.add_token_list(tokens)
  writer.add_token_types([3] + [1] * (len(tokens) - 2) + [3])
  writer.add_token_merges(['! "'])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(len(tokens) - 1)
  writer.add_add_bos_token(True)
  change(writer)
  heads = {'q_proj': config['num_attention_heads'], 'k_proj': config['num_key_value_heads']}
  for key, array in arrays.items():
    parts = key.split('.')
    layer = f'blk.{parts[2]}.' if 'layers' in parts else ''
    array = array.astype(np.float32)
    if arch == 'llama' and parts[-2] in heads:
      array = permuted(array, heads[parts[-2]])
    writer.add_tensor(f'{layer}{NAMES[parts[-2]]}.{parts[-1]}', array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize('name', ['llama_biased', 'qwen3'])
def test_weights_are_those_of_the_folder(name, tmp_path):
  write(tmp_path / 'a.gguf', name)
  if name == 'llama_biased':
    with pytest.raises(
      UserError, match=r'the tensor model\.layers\.0\.self_attn\.\w+\.bias has no place'
    ):
      convert(str(tmp_path / 'a.gguf'), str(tmp_path / 'no'))
    return
  convert(str(tmp_path / 'a.gguf'), str(tmp_path / 'a'))
  convert(str(MODELS / name), str(tmp_path / 'b'))
  one, two = runnable.load(str(tmp_path / 'a')), runnable.load(str(tmp_path / 'b'))
  for path, leaf in tree.named(two.variables).items():
    assert_array_equal(tree.named(one.variables)[path], leaf)
  fields = [dict(run.config.model) for run in (one, two)]
  assert fields[0].pop('norm_epsilon') == pytest.approx(fields[1].pop('norm_epsilon'))
  assert fields[0] == fields[1] and one.config.data.context == two.config.data.context


def test_rows_of_a_llama_are_put_back(tmp_path):
  write(tmp_path / 'a.gguf', 'llama3')
  convert(str(tmp_path / 'a.gguf'), str(tmp_path / 'a'))
  convert(str(MODELS / 'llama3'), str(tmp_path / 'b'))
  one, two = runnable.load(str(tmp_path / 'a')), runnable.load(str(tmp_path / 'b'))
  for path, leaf in tree.named(two.variables).items():
    assert_array_equal(tree.named(one.variables)[path], leaf)
  rows = load_file(MODELS / 'llama3' / 'model.safetensors')[
    'model.layers.0.self_attn.q_proj.weight'
  ]
  assert not np.array_equal(permuted(rows, 6), rows)


@pytest.mark.parametrize(('kind', 'error'), [('F16', 1e-3), ('BF16', 1e-2)])
def test_other_types_become_the_nearest_dtype_here(tmp_path, kind, error):
  write(tmp_path / 'a.gguf', 'qwen3')
  exact = gguf.GGUFReader(tmp_path / 'a.gguf')
  want = {t.name: t.data for t in exact.tensors}['blk.0.ffn_up.weight'].reshape(26, 24).T
  writer = gguf.GGUFWriter(tmp_path / 'b.gguf', 'qwen3')
  for key, field in exact.fields.items():
    if not key.startswith(('GGUF.', 'general.architecture')):
      sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
      writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
  wanted = gguf.GGMLQuantizationType[kind]
  for tensor in exact.tensors:
    array = tensor.data.reshape(tuple(reversed(tensor.shape)))
    small = gguf.quants.quantize(array, wanted) if array.ndim > 1 else array
    writer.add_tensor(tensor.name, small, raw_dtype=wanted if array.ndim > 1 else None)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  convert(str(tmp_path / 'b.gguf'), str(tmp_path / 'b'))
  run = runnable.load(str(tmp_path / 'b'))
  got = run.variables['params']['block_0']['mlp']['up']['kernel']
  assert run.config.model.weights_dtype == ('bfloat16' if kind == 'BF16' else 'float32')
  assert_allclose(np.asarray(got, np.float32), want, rtol=error)


def test_llama_3_keeps_words_that_are_tokens_and_begins_texts_by_default():
  tokens = ['<s>', *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), 'ab', 'abc']
  values = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3] + [1] * (len(tokens) - 1),
    'tokenizer.ggml.merges': ['a b'],
    'tokenizer.ggml.bos_token_id': 0,
  }
  words = {}
  for pre in ('llama-bpe', 'qwen2'):
    found = gguf_tokenizer.read(values | {'tokenizer.ggml.pre': pre}, 'a file', len(tokens))
    words[pre] = [tokens[i] for i in found.encode_prompt('abc')]
  assert words == {'llama-bpe': ['<s>', 'abc'], 'qwen2': ['ab', 'c']}


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_words_are_split_as_by_these_tokenizers(pre):
  """Each byte is a token, and digits, spaces and line breaks are split as they are there."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = ['<s>', *alphabet, '12', '123', 'Ġ1', '!Ċ', 'ĊĊ']
  values = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3] + [1] * (len(tokens) - 1),
    'tokenizer.ggml.merges': ['1 2', '12 3', 'Ġ 1', '! Ċ', 'Ċ Ċ'],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.add_bos_token': True,
  }
  found = gguf_tokenizer.read(values, 'a file', len(tokens))
  words = [tokens[i] for i in found.encode_prompt('1234 1!\n\na<s>')]
  digits = {'gpt-2': ['123', '4', 'Ġ1'], 'smollm': ['1', '2', '3', '4', 'Ġ', '1']}
  digits |= {'llama-bpe': ['123', '4', 'Ġ', '1'], 'qwen2': ['1', '2', '3', '4', 'Ġ', '1']}
  breaks = ['!Ċ', 'Ċ'] if pre in ('llama-bpe', 'qwen2') else ['!', 'Ċ', 'Ċ']
  assert words == ['<s>', *digits[pre], *breaks, 'a', '<s>']
  assert found.decode(found.encode('1234 1!\n\na')) == '1234 1!\n\na'


def test_files_that_cannot_be_converted_end_in_one_line(tmp_path):
  def refused(message, name='qwen3', change=lambda writer: None):
    path = tmp_path / f'{len(list(tmp_path.iterdir()))}.gguf'
    write(path, name, change)
    with pytest.raises(UserError, match=message) as raised:
      convert(str(path), str(tmp_path / 'no'))
    assert '\n' not in str(raised.value) and not (tmp_path / 'no').exists()
    return path

  refused(r"tokenizer\.ggml\.pre 'dbrx'", change=lambda w: w.add_tokenizer_pre('dbrx'))
  refused(
    r"the tokenizer 'llama' .* is not supported", change=lambda w: w.add_tokenizer_model('llama')
  )
  refused(
    r"rope\.scaling\.type='yarn'",
    change=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
  )
  path = refused(r'rope\.scaling\.factor=2\.0', change=lambda w: w.add_rope_scaling_factor(2.0))
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match='is damaged'):
    convert(str(path), str(tmp_path / 'no'))
  with pytest.raises(UserError, match='is not a file'):
    convert(str(tmp_path / 'none.gguf'), str(tmp_path / 'no'))
