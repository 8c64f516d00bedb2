"""Converts the tokenizer inside a GGUF file to a Hugging Face tokenizer."""

import json

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.data.hf_tokenizer import HuggingFace

BYTE_LEVEL = 'gpt2'  # GGUF's name of byte-level BPE tokenizers
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are never split
LLAMA_3 = 'llama-bpe'  # keeps words that are tokens whole, and begins texts with `bos` by default
_GPT2 = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
_BYTES = _GPT2 | {'use_regex': False}
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')


def _split(pattern: str) -> JsonObject:
  rule = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return {'type': 'Sequence', 'pretokenizers': [rule, _BYTES]}


# The rule that splits a text into words, by the value of `tokenizer.ggml.pre`.
_PRE: dict[str, JsonObject] = {
  'gpt-2': _GPT2,
  'smollm': {
    'type': 'Sequence',
    'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, _GPT2],
  },
  LLAMA_3: _split(_LLAMA3),
  'qwen2': _split(_QWEN2),
}


def read(values: dict[str, Json], where: str, rows: int) -> HuggingFace:
  """Returns the tokenizer.

  Args:
    values: the metadata of the file.
    where: the file, for messages.
    rows: rows of the model's embedding.

  Raises UserError if the file lacks the vocabulary or has another kind of tokenizer.
  """
  kind, pre = values.get('tokenizer.ggml.model'), values.get('tokenizer.ggml.pre')
  if kind != BYTE_LEVEL:
    raise UserError(
      f'{where}: the tokenizer {kind!r} (tokenizer.ggml.model) is not supported; valid: {BYTE_LEVEL!r}, '
      'or a folder of Hugging Face'
    )
  if pre not in _PRE:
    raise unknown(f'{where}: tokenizer.ggml.pre', pre, _PRE)
  tokens, merges = values.get('tokenizer.ggml.tokens'), values.get('tokenizer.ggml.merges')
  if not tokens or merges is None:
    raise UserError(
      f'{where} lacks the vocabulary of its tokenizer; valid: the file of a whole model'
    )
  kinds = values.get('tokenizer.ggml.token_type') or [1] * len(tokens)
  special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
  added = [_added(tokens[i], i, kinds[i] == CONTROL) for i in special]
  model = {
    'type': 'BPE',
    'vocab': {token: i for i, token in enumerate(tokens)},
    'merges': merges,
    **dict.fromkeys(('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix')),
    **dict.fromkeys(('fuse_unk', 'byte_fallback'), False),
    'ignore_merges': pre == LLAMA_3,
  }
  bos, eos = (values.get(f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos'))
  first = bos if values.get('tokenizer.ggml.add_bos_token', pre == LLAMA_3) else None
  contents = {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': {'type': 'NFC'} if pre == 'qwen2' else None,
    'pre_tokenizer': _PRE[pre],
    'post_processor': None if first is None else _begin_with(tokens[first], first),
    'decoder': _GPT2,
    'model': model,
  }
  text = json.dumps(contents, ensure_ascii=False)
  return HuggingFace(text, rows, bos, eos, values.get('tokenizer.chat_template'))


def _added(content: str, token: int, special: bool) -> JsonObject:
  plain = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'id': token, 'content': content, 'special': special, **plain}


def _begin_with(content: str, token: int) -> JsonObject:
  """Returns a post-processor that puts a token before each prompt."""
  one = {'id': content, 'ids': [token], 'tokens': [content]}
  first, text = (
    {'SpecialToken': {'id': content, 'type_id': 0}},
    {'Sequence': {'id': 'A', 'type_id': 0}},
  )
  return {
    'type': 'TemplateProcessing',
    'single': [first, text],
    'pair': [first, text, {'Sequence': {'id': 'B', 'type_id': 0}}],
    'special_tokens': {content: one},
  }
