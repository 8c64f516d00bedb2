"""A corpus: three splits of UTF-8 bytes, and a card that describes them.

The card has content hashes, so results can be checked to come from the same data.
"""

import dataclasses
import hashlib
from typing import TypedDict

from sparse_lm.core.records import JsonObject

SPLITS = ('train', 'validation', 'test')
SEPARATOR = b'\0'  # separates documents; no document contains it


class Card(TypedDict):
  """The keys of every card; sources add more. Dicts are by split, and `sha256` also has 'all'."""

  source: str
  documents: dict[str, int]
  bytes: dict[str, int]
  sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A corpus.

  Attributes:
    splits: the texts of 'train', 'validation' and 'test' as UTF-8 bytes.
    card: JSON values that describe their origin (see `Card`).
  """

  splits: dict[str, bytes]
  card: JsonObject

  def __repr__(self) -> str:
    sizes = ', '.join(f'{name} {len(text):,} bytes' for name, text in self.splits.items())
    return f'Corpus({self.card.get("source")}: {sizes})'


def join(members: dict[str, list[bytes]], origin: JsonObject) -> Corpus:
  """Joins texts to a corpus.

  Args:
    members: non-empty texts by split, in order; each consists of one or more documents.
    origin: JSON values that describe the source.

  Returns:
    A corpus whose card is `origin` plus `documents`, `bytes` and `sha256` of each split.
  """
  splits = {name: SEPARATOR.join(members[name]) for name in SPLITS}
  documents = {name: text.count(SEPARATOR) + 1 if text else 0 for name, text in splits.items()}
  digests = {name: hashlib.sha256(text).hexdigest() for name, text in splits.items()}
  # The hash of the three hashes. Unlike a hash of the joined text, it depends on where the splits end.
  digests['all'] = hashlib.sha256(''.join(digests[name] for name in SPLITS).encode()).hexdigest()
  sizes = {name: len(text) for name, text in splits.items()}
  return Corpus(splits, {**origin, 'documents': documents, 'bytes': sizes, 'sha256': digests})


def why_not_text(data: bytes) -> str:
  """Returns the reason why `data` cannot be a document of a corpus; '' if it can."""
  try:
    data.decode()
  except UnicodeDecodeError as error:
    return f'is not UTF-8 (byte {error.start})'
  return 'contains zero bytes, so it is not text' if SEPARATOR in data else ''
