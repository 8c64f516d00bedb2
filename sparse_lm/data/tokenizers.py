"""Tokenizers: bytes (the default), characters as in nanoGPT, byte-level BPE, and those of Hugging Face.

All encode text (a string or UTF-8 bytes) to a 1-D array of the smallest unsigned integer type that holds
the vocabulary, so tokens take no more memory than the text. The zero byte between documents is always the
same single token, so the tokens of joined texts are the joined tokens.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, TypedDict

import numpy as np
from tqdm import tqdm

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.data.corpus import Corpus
from sparse_lm.data.hf_tokenizer import KIND, HuggingFace
from sparse_lm.data.tokenizer_base import SavedTokenizer, as_bytes, as_utf8, in_vocabulary, library

if TYPE_CHECKING:
  import tokenizers

NAMES = ('bytes', 'bpe', 'chars')  # kinds that `build` makes from text
_CODE_POINTS = 0x110000  # number of code points in Unicode
_UNSEEN = 0xFFFF
_LARGEST_VOCABULARY = 0xFFFF  # an id must fit in uint16 and differ from _UNSEEN
# Positions where GPT-2's pattern always ends a word: before white space, and between letters or digits
# and punctuation. Only characters whose class is the same in all Unicode versions are considered.
_END_OF_WORD = re.compile(r'(?<=\S)(?=[ \t\n\r])|(?<=[A-Za-z0-9])(?=[!-/:-@\[-`{-~])')
_PIECE = 4096  # length of a piece in characters, extended to the next end of a word
_PIECES = 128  # pieces that are encoded at once (half a megabyte), to limit memory


@dataclasses.dataclass(frozen=True)
class Bytes(SavedTokenizer):
  """The token id of a byte is its value."""

  vocab_size: ClassVar[int] = 256

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns uint8 tokens, one per byte; a read-only view of `text` if it is bytes.

    Raises:
      UserError: `text` is a string that UTF-8 cannot encode.
    """
    return np.frombuffer(as_bytes(text), np.uint8)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of 1-D `ids`; invalid UTF-8 becomes U+FFFD. Raises ValueError for an id > 255."""
    return bytes(np.asarray(ids).tolist()).decode(errors='replace')

  def to_json(self) -> dict[str, str]:
    return {'name': 'bytes'}


@dataclasses.dataclass(frozen=True, repr=False)
class Chars(SavedTokenizer):
  """The token id of a character is its index in `chars`, which is sorted and has no repeats.

  The zero byte between documents is a character, too. The constructor raises a `UserError` if there are
  no characters or more than 65535.
  """

  chars: str

  def __post_init__(self) -> None:
    if not 0 < len(self.chars) <= _LARGEST_VOCABULARY:
      raise UserError(
        f"config.data.tokenizer='chars' found {len(self.chars)} different characters; "
        f"valid: 1 to {_LARGEST_VOCABULARY}, or config.data.tokenizer='bytes'"
      )

  @property
  def vocab_size(self) -> int:
    return len(self.chars)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns tokens, one per character; uint8, or uint16 for more than 256 characters.

    Raises:
      UserError: `text` is not UTF-8 or has a character outside the vocabulary.
    """
    codes = _code_points(as_utf8(text))
    ids = self._id_of_code[codes]
    if (ids == _UNSEEN).any():
      first = chr(codes[np.argmax(ids == _UNSEEN)])
      raise UserError(
        f"config.data.tokenizer='chars' has no token for {first!r} (U+{ord(first):04X}); "
        f"valid: the {self.vocab_size} characters of its corpus, or config.data.tokenizer='bytes'"
      )
    return ids.astype(np.uint8 if self.vocab_size <= 256 else np.uint16)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of 1-D `ids`. Raises an IndexError for an id outside the vocabulary."""
    return ''.join(self.chars[i] for i in np.asarray(ids).tolist())

  def to_json(self) -> dict[str, str]:
    return {'name': 'chars', 'chars': self.chars}

  @functools.cached_property
  def _id_of_code(self) -> np.ndarray:
    """Token of each code point, uint16 `[_CODE_POINTS]`; encoding is a single gather."""
    table = np.full(_CODE_POINTS, _UNSEEN, np.uint16)
    table[_code_points(self.chars)] = np.arange(len(self.chars))
    return table


@dataclasses.dataclass(frozen=True, repr=False)
class Bpe(SavedTokenizer):
  """Byte-level BPE with GPT-2's splitting into words, computed by Hugging Face `tokenizers`.

  The vocabulary consists of the 256 bytes, in the order of the characters that represent them, followed
  by the merged pairs.

  Attributes:
    merges: one pair of tokens per line, in the order of merging, as in GPT-2's merges.txt.
  """

  merges: str

  @classmethod
  def train(cls, text: bytes, vocab_size: int) -> 'Bpe':
    """Learns the merges from UTF-8 `text`. The vocabulary is smaller if there are too few pairs.

    Raises:
      UserError: the size is outside [257, 65535], or `tokenizers` is not installed.
    """
    require(
      257 <= vocab_size <= _LARGEST_VOCABULARY,
      'config.data.vocab_size',
      vocab_size,
      f'257 (the bytes and a merge) to {_LARGEST_VOCABULARY}',
    )
    package = library('bpe')
    model = _byte_level(package.models.BPE())
    trainer = package.trainers.BpeTrainer(
      vocab_size=vocab_size, initial_alphabet=_alphabet(), show_progress=False
    )
    model.train_from_iterator(_pieces(as_utf8(text)), trainer)
    return cls('\n'.join(map(' '.join, json.loads(model.to_str())['model']['merges'])))

  @functools.cached_property
  def vocab_size(self) -> int:
    return 256 + len({pair.replace(' ', '') for pair in self.merges.splitlines()})

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns uint16 tokens. Raises a `UserError` if `text` is not UTF-8."""
    text = as_utf8(text)
    pieces, found = _pieces(text), [np.empty(0, np.uint16)]
    options = {'delay': 2, 'leave': False, 'unit_scale': True, 'disable': None}
    with tqdm(total=len(text), desc='encoding', **options) as bar:
      while batch := list(itertools.islice(pieces, _PIECES)):
        encoded = self._model.encode_batch_fast(batch)
        ids = itertools.chain.from_iterable(piece.ids for piece in encoded)
        found.append(np.fromiter(ids, np.uint16))
        bar.update(sum(map(len, batch)))
    return np.concatenate(found)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of 1-D `ids`; invalid UTF-8 becomes U+FFFD.

    Raises:
      IndexError: an id is outside the vocabulary.
    """
    return self._model.decode(in_vocabulary(ids, self.vocab_size))

  def to_json(self) -> dict[str, str]:
    return {'name': 'bpe', 'merges': self.merges}

  @property
  def contents(self) -> str:
    """The JSON text of the library `tokenizers`, as in the tokenizer.json of a model of Hugging Face."""
    return self._model.to_str()

  @functools.cached_property
  def _model(self) -> 'tokenizers.Tokenizer':
    pairs = [tuple(line.split(' ')) for line in self.merges.splitlines()]
    tokens = dict.fromkeys([*_alphabet(), *map(''.join, pairs)])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return _byte_level(library('bpe').models.BPE(vocab=vocabulary, merges=pairs))


Tokenizer = Bytes | Chars | Bpe | HuggingFace


def build(name: str, corpus: Corpus, vocab_size: int) -> Tokenizer:
  """Returns the tokenizer `name` for `corpus`.

  'chars' contains the characters of all splits, as in nanoGPT, so there is no unknown token. 'bpe' is
  learned from the training split and has up to `vocab_size` tokens.

  Raises:
    UserError: the name is unknown, only an imported model has such a tokenizer, or `Chars` or `Bpe.train`
      raised an error.
  """
  if name == KIND:
    raise UserError(
      f'config.data.tokenizer={name!r} is the tokenizer of an imported model; valid: config.init_from=W, '
      'where python -m sparse_lm.convert --from=MODEL --out=W wrote W'
    )
  if name == 'bytes':
    return Bytes()
  if name == 'chars':
    return Chars(''.join(sorted(set().union(*map(as_utf8, corpus.splits.values())))))
  if name == 'bpe':
    return Bpe.train(corpus.splits['train'], vocab_size)
  raise unknown('config.data.tokenizer', name, (*NAMES, KIND))


def from_json(saved: records.Json) -> Tokenizer:
  """Restores a tokenizer from the result of `to_json`.

  Raises:
    UserError: the name is unknown, or the fields are not those of a tokenizer that `build` returned.
  """
  try:
    records.check(saved, _Named)
    name = saved['name']
    if name == KIND:
      return HuggingFace.from_json(saved)
    if name not in NAMES:
      raise unknown('tokenizer', name, (*NAMES, KIND))
    if name == 'bytes':
      return Bytes()
    if name == 'chars':
      records.check(saved, _SavedChars)
      return Chars(_sorted_characters(saved['chars']))
    records.check(saved, _SavedBpe)
    return Bpe(_possible_merges(saved['merges']))
  except ValueError as error:
    raise UserError(f'the tokenizer is damaged ({error}); valid: one that training saved') from None


class _Named(TypedDict):
  name: str


class _SavedChars(_Named):
  chars: str


class _SavedBpe(_Named):
  merges: str


def _sorted_characters(chars: str) -> str:
  if list(chars) != sorted(set(chars)):
    raise ValueError('its chars are not sorted, or some are repeated')
  chars.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
  return chars


def _possible_merges(merges: str) -> str:
  """Returns `merges`; raises a `ValueError` unless every pair consists of bytes and earlier pairs."""
  lines = merges.splitlines()
  if len(lines) > _LARGEST_VOCABULARY:
    raise ValueError(f'it has {len(lines)} merges, more than {_LARGEST_VOCABULARY}')
  known = set(_alphabet())
  for number, line in enumerate(lines, start=1):
    pair = line.split(' ')
    if len(pair) != 2 or not known.issuperset(pair):
      raise ValueError(f'merge {number} is {line[:40]!r} and not a pair of known tokens')
    known.add(''.join(pair))
  return merges


def _alphabet() -> list[str]:
  """Returns the printable characters that represent the 256 bytes in GPT-2."""
  return sorted(library('bpe').pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: 'tokenizers.models.Model') -> 'tokenizers.Tokenizer':
  package = library('bpe')
  tokenizer = package.Tokenizer(model)
  tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = package.decoders.ByteLevel()
  return tokenizer


def _pieces(text: str) -> Iterator[str]:
  """Yields pieces of `text` whose tokens together are those of the whole text, for several threads.

  Zero bytes are separate pieces. Other pieces have about `_PIECE` characters, or more if no word ends.
  """
  for number, document in enumerate(text.split('\0')):
    if number:
      yield '\0'
    start = 0
    while start < len(document):
      end = _END_OF_WORD.search(document, start + _PIECE)
      stop = end.start() if end else len(document)
      yield document[start:stop]
      start = stop


def _code_points(text: str) -> np.ndarray:
  """Returns the code points of `text`, uint32."""
  return np.frombuffer(text.encode('utf-32-le'), np.uint32)
