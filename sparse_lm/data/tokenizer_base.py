"""What all tokenizers share: a digest, and the checks of the text that they encode."""

import functools
import types
from collections.abc import Sequence

import numpy as np

from sparse_lm.core import records
from sparse_lm.core.errors import UserError


class SavedTokenizer:
  """Base class of tokenizers with `to_json`, `encode` and `vocab_size`."""

  bos: int | None = None  # the token that begins a text; `None` if there is none
  eos: int | None = None  # the token that ends a text; `None` if there is none

  @functools.cached_property
  def digest(self) -> str:
    """Digest of the canonical JSON; equal digests mean equal token ids."""
    return records.digest(self.to_json())

  def encode_prompt(self, text: str | bytes) -> np.ndarray:
    """Returns the tokens of a prompt: those of `encode`, and the special tokens that begin a text."""
    return self.encode(text)

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.vocab_size} tokens)'


def library(kind: str) -> types.ModuleType:
  """Returns the library `tokenizers`. Raises UserError, with the kind of tokenizer, if it is missing."""
  try:
    import tokenizers
  except ImportError:
    raise UserError(
      f"config.data.tokenizer='{kind}' needs a package: pip install 'tokenizers>=0.22'; "
      "valid without it: 'bytes', 'chars'"
    ) from None
  return tokenizers


def in_vocabulary(ids: Sequence[int] | np.ndarray, size: int) -> list[int]:
  """Returns 1-D `ids` as a list. Raises an IndexError for an id outside a vocabulary of `size` tokens."""
  ids = np.asarray(ids, int)
  if ((ids < 0) | (ids >= size)).any():
    raise IndexError(f'ids {ids.min()} to {ids.max()}, vocabulary {size}')
  return ids.tolist()


def as_bytes(text: str | bytes) -> bytes:
  """Returns text in UTF-8. Raises UserError for other types and for lone surrogates."""
  if isinstance(text, bytes):
    return text
  if not isinstance(text, str):
    raise UserError(
      f'a tokenizer cannot encode {type(text).__name__}; valid: a string or UTF-8 bytes'
    )
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'character {error.start} ({text[error.start]!r}) of the text cannot be encoded in UTF-8; valid: '
      'text without lone surrogates'
    ) from None


def as_utf8(text: str | bytes) -> str:
  """Returns text as a string. Raises UserError if bytes are not UTF-8."""
  try:
    return as_bytes(text).decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'config.data.tokenizer needs UTF-8 text, but byte {error.start} is not UTF-8; '
      "valid: UTF-8, or config.data.tokenizer='bytes'"
    ) from error
