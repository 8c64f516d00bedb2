"""What every source gives: three splits of UTF-8 bytes and a card that says what they are.

The card has content hashes, so that two numbers can be known to come from the same data.
"""

import dataclasses
import hashlib
from typing import TypedDict

from sparse_lm.core.records import JsonObject

SPLITS = ('train', 'validation', 'test')
SEPARATOR = b'\0'  # stands between documents; no document contains it


class Card(TypedDict):
  """What every card says, beside what its source adds; by split, `sha256` also of 'all'."""

  source: str
  documents: dict[str, int]
  bytes: dict[str, int]
  sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """`splits`: 'train', 'validation' and 'test' as UTF-8 bytes; `card`: their JSON-able origin."""

  splits: dict[str, bytes]
  card: JsonObject

  def __repr__(self) -> str:
    sizes = ', '.join(f'{name} {len(text):,} bytes' for name, text in self.splits.items())
    return f'Corpus({self.card.get("source")}: {sizes})'


def join(members: dict[str, list[bytes]], origin: JsonObject) -> Corpus:
  """The corpus of `members`: per split, non-empty texts in order, each one or more documents.

  The card is `origin` with each split's number of `documents`, `bytes` and `sha256`.
  """
  splits = {name: SEPARATOR.join(members[name]) for name in SPLITS}
  documents = {name: text.count(SEPARATOR) + 1 if text else 0 for name, text in splits.items()}
  digests = {name: hashlib.sha256(text).hexdigest() for name, text in splits.items()}
  # The hash of the three hashes: unlike that of the joined text, it also fixes where the cuts are.
  digests['all'] = hashlib.sha256(''.join(digests[name] for name in SPLITS).encode()).hexdigest()
  sizes = {name: len(text) for name, text in splits.items()}
  return Corpus(splits, {**origin, 'documents': documents, 'bytes': sizes, 'sha256': digests})


def why_not_text(data: bytes) -> str:
  """What keeps `data` from being a document of a corpus; empty where nothing does."""
  try:
    data.decode()
  except UnicodeDecodeError as error:
    return f'is not UTF-8 (byte {error.start})'
  return 'holds zero bytes, so it is not text' if SEPARATOR in data else ''
