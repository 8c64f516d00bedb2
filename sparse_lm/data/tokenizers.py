"""Text to token ids and back: bytes (the default) and nanoGPT's characters.

Both map UTF-8 bytes to a 1-D array of the smallest unsigned integer type that holds the vocabulary,
so a corpus in memory stays as small as its text.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.data.sources import Corpus

NAMES = ('bytes', 'chars')
_CODE_POINTS = 0x110000  # of Unicode
_UNSEEN = 0xFFFF
_LARGEST_VOCABULARY = 0xFFFF  # an id must fit in uint16 and differ from _UNSEEN


class _Json:
  """What every tokenizer has by virtue of `to_json`."""

  @functools.cached_property
  def digest(self) -> str:
    """sha256 (hex) of the canonical JSON: equal digests mean equal token ids."""
    canonical = json.dumps(self.to_json(), sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Bytes(_Json):
  """Token id = byte value."""

  vocab_size: ClassVar[int] = 256

  def encode(self, text: bytes) -> np.ndarray:
    """`[len(text)]` uint8, a read-only view of `text`."""
    return np.frombuffer(text, np.uint8)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of 1-D `ids`; what is not UTF-8 becomes U+FFFD. Raises `ValueError` above 255."""
    return bytes(np.asarray(ids).tolist()).decode(errors='replace')

  def to_json(self) -> dict[str, Any]:
    return {'name': 'bytes'}


@dataclasses.dataclass(frozen=True)
class Chars(_Json):
  """Token id = place of the character in `chars`, which is sorted and free of repeats.

  The zero byte between documents is a character like the others.
  Raises `UserError` for an empty vocabulary or one of more than 65535 characters.
  """

  chars: str

  def __post_init__(self) -> None:
    if not 0 < len(self.chars) <= _LARGEST_VOCABULARY:
      raise UserError(
        f"config.data.tokenizer 'chars' found {len(self.chars)} different characters; "
        f"valid: 1 to {_LARGEST_VOCABULARY}, or config.data.tokenizer='bytes'"
      )

  @property
  def vocab_size(self) -> int:
    return len(self.chars)

  def encode(self, text: bytes) -> np.ndarray:
    """`[characters of text]` uint8, or uint16 where the vocabulary exceeds 256.

    Raises `UserError` where `text` is not UTF-8 or has a character outside the vocabulary.
    """
    codes = _code_points(_utf8(text))
    ids = self._id_of_code[codes]
    if (ids == _UNSEEN).any():
      first = chr(codes[np.argmax(ids == _UNSEEN)])
      raise UserError(
        f"config.data.tokenizer 'chars' has no token for {first!r} (U+{ord(first):04X}); "
        f"valid: the {self.vocab_size} characters of its corpus, or config.data.tokenizer='bytes'"
      )
    return ids.astype(np.uint8 if self.vocab_size <= 256 else np.uint16)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of 1-D `ids`. Raises `IndexError` for an id outside the vocabulary."""
    return ''.join(self.chars[i] for i in np.asarray(ids).tolist())

  def to_json(self) -> dict[str, Any]:
    return {'name': 'chars', 'chars': self.chars}

  @functools.cached_property
  def _id_of_code(self) -> np.ndarray:
    """`[_CODE_POINTS]` uint16: one gather encodes megabytes."""
    table = np.full(_CODE_POINTS, _UNSEEN, np.uint16)
    table[_code_points(self.chars)] = np.arange(len(self.chars))
    return table


Tokenizer = Bytes | Chars


def build(name: str, corpus: Corpus) -> Tokenizer:
  """The tokenizer `name`, fitted to every split of `corpus` (nanoGPT's choice: no unknown token).

  Raises `UserError` for an unknown name and as `Chars` does.
  """
  if name == 'bytes':
    return Bytes()
  if name == 'chars':
    return Chars(''.join(sorted(set().union(*map(_utf8, corpus.splits.values())))))
  raise unknown('config.data.tokenizer', name, NAMES)


def from_json(saved: dict[str, Any]) -> Tokenizer:
  """The inverse of `to_json`. Raises `UserError` for an unknown name."""
  fields = dict(saved)
  name = fields.pop('name', None)
  if name not in NAMES:
    raise unknown('tokenizer', name, NAMES)
  return {'bytes': Bytes, 'chars': Chars}[name](**fields)


def _utf8(text: bytes) -> str:
  try:
    return text.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f"config.data.tokenizer 'chars' needs UTF-8 text, which byte {error.start} is not; "
      "valid: UTF-8, or config.data.tokenizer='bytes'"
    ) from error


def _code_points(text: str) -> np.ndarray:
  """`[len(text)]` uint32."""
  return np.frombuffer(text.encode('utf-32-le'), np.uint32)
