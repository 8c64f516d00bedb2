"""Reads a Hugging Face folder: config.json, safetensors files and tokenizer.json."""

import functools
import json
import pathlib
from typing import TypedDict

import numpy as np

from sparse_lm.convert.family import family
from sparse_lm.convert.foreign import Foreign, Stored
from sparse_lm.core import records
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tensor_files import open_tensors
from sparse_lm.data.hf_tokenizer import HuggingFace

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
TOKENIZER, TOKENIZER_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
CHAT_TEMPLATE, GENERATION = 'chat_template.jinja', 'generation_config.json'


class _Added(TypedDict):
  id: int
  content: str


class _Index(TypedDict):
  weight_map: dict[str, str]


def read_plain_json(path: pathlib.Path, schema: records.Schema = records.OBJECT) -> JsonObject:
  """Returns the contents of another program's JSON file. Raises UserError if it cannot be read."""
  try:
    return records.parse(path.read_bytes(), schema)
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); valid: a complete folder') from None
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None


def read(folder: pathlib.Path) -> Foreign:
  """Reads the config and the names of the tensors.

  Raises UserError if the family is unknown, if files are missing or damaged, or if the weights are
  quantised.
  """
  where = str(folder / CONFIG)
  if not (folder / CONFIG).is_file():
    raise UserError(f'{folder} has no {CONFIG}; valid: a folder of Hugging Face, or a .gguf file')
  config = read_plain_json(folder / CONFIG)
  found = family(config.get('model_type'), f'{where}: model_type')
  if quantisation := config.get('quantization_config'):
    method = quantisation.get('quant_method') if isinstance(quantisation, dict) else quantisation
    raise UserError(
      f'{where}: quantization_config ({method}) is not supported; valid: float32, float16 or bfloat16 '
      'weights'
    )
  stored = _stored(folder)
  tokenizer = functools.partial(_tokenizer, folder, config)
  return Foreign(folder, where, found, config, stored, tokenizer)


def _stored(folder: pathlib.Path) -> dict[str, Stored]:
  """Returns all tensors by name."""
  files = [folder / WEIGHTS]
  names: dict[str, str] = {}
  if (folder / INDEX).is_file():
    names = read_plain_json(folder / INDEX, _Index)['weight_map']
    files = [folder / name for name in sorted({*names.values()})]
  for path in files:
    if not path.is_file():
      raise UserError(f'{folder} has no {path.name}; valid: a folder with all safetensors files')
  found: dict[str, Stored] = {}
  for path in files:
    for name, array in open_tensors(path).arrays.items():
      found[name] = Stored(array.shape, array.dtype, functools.partial(_itself, array))
  if lost := sorted(names.keys() - found.keys()):
    raise UserError(
      f'{folder / names[lost[0]]} has no tensor {lost[0]}; valid: the file that {INDEX} means'
    )
  return found


def _itself(value: np.ndarray) -> np.ndarray:
  return value


def _tokenizer(folder: pathlib.Path, config: JsonObject, rows: int) -> HuggingFace:
  """Reads tokenizer.json and the special tokens of a model with `rows` rows of embeddings."""
  if not (folder / TOKENIZER).is_file():
    raise UserError(
      f'{folder} has no {TOKENIZER}; valid: a folder with it (AutoTokenizer.from_pretrained(...).'
      'save_pretrained(...) writes it)'
    )
  contents = read_plain_json(folder / TOKENIZER)
  vocabulary = contents['model'].get('vocab') if isinstance(contents.get('model'), dict) else None
  if not vocabulary:
    raise UserError(f'{folder / TOKENIZER} has no vocabulary; valid: a whole tokenizer')
  options = (
    read_plain_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
  )
  added = contents.get('added_tokens') or []
  try:
    records.check(added, list[_Added], 'added_tokens')
  except ValueError as error:
    raise UserError(
      f'{folder / TOKENIZER} is damaged ({error}); valid: a whole tokenizer'
    ) from None
  tokens = _ids(vocabulary) | {one['content']: one['id'] for one in added}
  special = [_special(f'{name}_token', options, tokens, config) for name in ('bos', 'eos')]
  return HuggingFace(
    json.dumps(contents, ensure_ascii=False), rows, *special, _template(folder, options)
  )


def _ids(vocabulary: object) -> dict[str, int]:
  """Returns the id of each token. Vocabularies of unigram models are lists of pairs."""
  if isinstance(vocabulary, dict):
    return dict(vocabulary)
  return {pair[0]: i for i, pair in enumerate(vocabulary)}


def _special(
  name: str, options: JsonObject, tokens: dict[str, int], config: JsonObject
) -> int | None:
  """Returns the id of a special token, from tokenizer_config.json or else from config.json."""
  value = options.get(name)
  text = value.get('content') if isinstance(value, dict) else value
  if text in tokens:
    return tokens[text]
  found = config.get(f'{name}_id')
  found = found[0] if isinstance(found, list) and found else found
  return found if isinstance(found, int) else None


def _template(folder: pathlib.Path, options: JsonObject) -> str | None:
  if (folder / CHAT_TEMPLATE).is_file():
    return (folder / CHAT_TEMPLATE).read_text(encoding='utf-8')
  found = options.get('chat_template')
  if isinstance(found, list):  # several templates by name
    found = next((one.get('template') for one in found if one.get('name') == 'default'), None)
  return found if isinstance(found, str) else None
