"""Reads GGUF files of llama.cpp. The package `gguf` converts quantised weights to float32."""

import functools
import pathlib
import re
import types
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from sparse_lm.convert import gguf_tokenizer
from sparse_lm.convert.family import Family, family, names
from sparse_lm.convert.foreign import Foreign, Stored
from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.core.records import Json, JsonObject

if TYPE_CHECKING:
  import gguf

# Fields of config.json, by the key of the metadata without the architecture's name before it.
_FIELDS = {
  'context_length': 'max_position_embeddings',
  'block_count': 'num_hidden_layers',
  'embedding_length': 'hidden_size',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'rope.freq_base': 'rope_theta',
}
# Keys whose values follow from those of other keys.
_REPEATED = ('vocab_size', 'rope.dimension_count', 'attention.value_length')
_TENSORS = {
  'token_embd': 'embed_tokens',
  'output_norm': 'norm',
  'output': 'lm_head',
}
_OF_LAYER = {
  'attn_norm': 'input_layernorm',
  'ffn_norm': 'post_attention_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_LAYER = re.compile(r'blk\.(\d+)\.(\w+)\.(weight|bias)')


def _library() -> types.ModuleType:
  try:
    import gguf
  except ImportError:
    raise UserError(
      "a .gguf file needs a package: pip install 'gguf>=0.10'; valid without it: a folder of Hugging Face"
    ) from None
  return gguf


def read(path: pathlib.Path) -> Foreign:
  """Reads the metadata and the names of the tensors.

  Raises UserError if the file is damaged, or if its family or a quantisation is not supported.
  """
  library = _library()
  if not path.is_file():
    raise UserError(
      f'--from={path} is not a file; valid: a .gguf file, or a folder of Hugging Face'
    )
  try:
    reader = library.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
  except Exception as error:  # the library raises many types for a damaged file
    raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None
  found = _family(values.get('general.architecture'), path)
  config = _config(values, reader, path)
  heads = config['num_attention_heads'], config.get('num_key_value_heads')
  stored = {
    (name := _name(tensor.name)): _stored(tensor, found, name, heads, path)
    for tensor in reader.tensors
  }
  tokenizer = functools.partial(gguf_tokenizer.read, values, str(path))
  return Foreign(path, str(path), found, config, stored, tokenizer)


def _family(architecture: Json, path: pathlib.Path) -> Family:
  known = [name for name in names() if family(name, '').gguf_permutes is not None]
  if architecture not in known:
    raise unknown(f'{path}: general.architecture', architecture, known)
  return family(architecture, '')


def _config(values: dict[str, Json], reader: 'gguf.GGUFReader', path: pathlib.Path) -> JsonObject:
  """Returns the metadata as fields of config.json."""
  prefix = f'{values["general.architecture"]}.'
  tensors = {tensor.name for tensor in reader.tensors}
  config: JsonObject = {'tie_word_embeddings': 'output.weight' not in tensors}
  for key, value in values.items():
    name = key.removeprefix(prefix)
    if key.startswith(prefix) and name not in _REPEATED:
      config[_FIELDS.get(name, name)] = value
  config['vocab_size'] = len(values.get('tokenizer.ggml.tokens') or ())
  for key in ('attention.head_count', 'embedding_length'):
    if not config.get(_FIELDS[key]):
      raise UserError(f'{path} has no {prefix}{key}; valid: the file of a whole model')
  whole = config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']
  rotated = values.get(f'{prefix}rope.dimension_count', whole)
  valid = f'{whole}, the width of a head'
  require(rotated == whole, f'{path}: {prefix}rope.dimension_count', rotated, valid)
  return config


def _name(name: str) -> str:
  """Returns the Hugging Face name of a tensor, or `name` itself if there is none."""
  if found := _LAYER.fullmatch(name):
    layer, module, part = found.groups()
    return f'model.layers.{layer}.{_OF_LAYER[module]}.{part}' if module in _OF_LAYER else name
  module, _, part = name.rpartition('.')
  prefix = '' if module == 'output' else 'model.'
  return f'{prefix}{_TENSORS[module]}.{part}' if module in _TENSORS else name


def _stored(
  tensor: 'gguf.ReaderTensor',
  found: Family,
  name: str,
  heads: tuple[int, int | None],
  path: pathlib.Path,
) -> Stored:
  """Returns a tensor. Dimensions in the file are listed from the last to the first."""
  library = _library()
  shape = tuple(int(size) for size in reversed(tensor.shape))
  kinds = library.GGMLQuantizationType
  dtype = np.dtype(ml_dtypes.bfloat16 if tensor.tensor_type == kinds.BF16 else np.float32)
  count = {'q_proj': heads[0], 'k_proj': heads[1] or heads[0]}.get(name.split('.')[-2])

  def read_array() -> np.ndarray:
    try:
      array = library.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    except (NotImplementedError, KeyError):
      raise UserError(
        f'{path}: the tensor {name} has the quantisation {tensor.tensor_type.name}, which the package '
        'gguf does not read; valid: another quantisation, such as Q8_0'
      ) from None
    if found.gguf_permutes and count:
      # The file holds pairs of rotated dimensions next to each other; here they are half a head apart.
      pairs = array.reshape(count, -1, 2, *shape[1:])
      array = pairs.swapaxes(1, 2).reshape(shape)
    return array

  return Stored(shape, dtype, read_array)
