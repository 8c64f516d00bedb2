"""Where the text comes from: the embedded default corpus or the reader's own local data.

Nothing is ever downloaded.
"""

import glob
import hashlib
import math
import os
import pathlib
import platform
import sysconfig

from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.data import mixture, prepared
from sparse_lm.data.corpus import SPLITS, Corpus, join, why_not_text

FRACTIONS = (0.9, 0.05, 0.05)  # train, validation, test

_HELD_OUT_BYTES = 100_000  # of the standard library, for validation and again for test
_LARGEST_HELD_OUT_FILE = 50_000  # one file must not be most of a held-out split
# Test suites, what is installed beside the library, and files that differ from machine to machine.
# `encodings` is some hundred near copies of one table: held out, they would measure memory.
_LEFT_OUT = {'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
_LEFT_OUT |= {'site-packages', 'dist-packages'}
_LEFT_OUT_PREFIXES = ('test_', '_sysconfigdata', 'sitecustomize', 'usercustomize')


def load(config: ConfigDict) -> Corpus:
  """The corpus that `config.source`, `config.path` and `config.split` name.

  Raises `UserError` for an unknown source and as the source does (`files`, `prepared.read`,
  `mixture.load`).
  """
  readers = {
    'stdlib': lambda path: stdlib(),
    'files': lambda path: files(path, tuple(config.split)),
    'tfds': prepared.read,
  }
  if config.source == 'mixture':
    return mixture.load(config.path, readers)
  if config.source not in readers:
    raise unknown('config.data.source', config.source, (*readers, 'mixture'))
  return readers[config.source](config.path)


def stdlib() -> Corpus:
  """The source text of the running Python's standard library: about 11 MB on every machine.

  Whole files are held out. The hash of a file's relative path decides, so the split depends neither
  on where Python lives nor on the order in which the file system lists it; it does depend on the
  Python version, which the card records.
  """
  documents = _python_files(pathlib.Path(sysconfig.get_path('stdlib')))
  if not documents:
    raise UserError(
      "config.data.source 'stdlib': this Python has no .py files of its own; "
      "valid: config.data.source='files' with config.data.path naming local text"
    )
  members: dict[str, list[bytes]] = {name: [] for name in SPLITS}
  held_out = dict.fromkeys(('validation', 'test'), 0)
  for path in sorted(documents, key=lambda path: hashlib.sha256(path.encode()).digest()):
    text = documents[path]
    room = [name for name, size in held_out.items() if size < _HELD_OUT_BYTES]
    if room and len(text) <= _LARGEST_HELD_OUT_FILE:
      held_out[room[0]] += len(text)
      members[room[0]].append(text)
    else:
      members['train'].append(text)
  origin = {'source': 'stdlib', 'python': platform.python_version(), 'files': len(documents)}
  return join(members, origin)


def files(path_glob: str, split: tuple[float, float, float] = FRACTIONS) -> Corpus:
  """Local UTF-8 text files (`~` and `**` are expanded), each cut by position at the same fractions.

  Raises `UserError` where `split` is not three fractions of a whole, where nothing matches, and as
  `cut` does.
  """
  _check_fractions(split)
  if not path_glob:
    raise UserError(
      "config.data.source 'files' needs config.data.path: a text file or a glob such as ~/text/*"
    )
  paths = matching(path_glob)
  origin = {'source': 'files', 'path': path_glob, 'split': list(split), 'files': len(paths)}
  return join(cut(paths, split), origin)


def matching(path_glob: str, field: str = 'config.data.path') -> list[str]:
  """The files that a glob matches, sorted. Folders and files that exist are taken by their name, even
  if it holds brackets or a star. Raises `UserError`, naming `field`, where no file matches."""
  pattern = pathlib.Path(os.path.expanduser(path_glob))
  there = next(part for part in (pattern, *pattern.parents) if os.path.lexists(part))
  rest = [str(pattern.relative_to(there))] if pattern != there else []
  found = glob.glob(os.path.join(glob.escape(str(there)), *rest), recursive=True)
  paths = [path for path in sorted(found) if os.path.isfile(path)]
  if not paths:
    raise UserError(f'{field} {path_glob!r} matches no file; valid: a text file or a glob (**)')
  return paths


def cut(
  paths: list[str], split: tuple[float, float, float], field: str = 'config.data.path'
) -> dict[str, list[bytes]]:
  """Per split, what each file has there: the documents of a corpus.

  The cuts count characters, as nanoGPT and TFDS cut tiny shakespeare, and every file is in every
  split, so a mixture is validated in its own proportions.

  Raises `UserError`, naming `field`, where a file is empty or not UTF-8 text, and where a split with
  a fraction above 0 would stay empty.
  """
  members: dict[str, list[bytes]] = {name: [] for name in SPLITS}
  for path in paths:
    text = read_text(path, field)
    # 0.7 + 0.1 is a hair below 0.8: the small term keeps exact cuts from losing a character.
    first = int(len(text) * split[0] + 1e-6)
    second = int(len(text) * (split[0] + split[1]) + 1e-6)
    for name, part in zip(SPLITS, (text[:first], text[first:second], text[second:])):
      if part:
        members[name].append(part.encode())
  for name, fraction in zip(SPLITS, split):
    if fraction and not members[name]:
      raise UserError(
        f'{field}: {len(paths)} files are too short for fractions of {split}: {name} is empty; '
        'valid: more text, or another config.data.split'
      )
  return members


def read_text(path: str, field: str) -> str:
  """A file's text. Raises `UserError`, naming `field`, where it can't be read, is empty or not UTF-8."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f'{field}: {path!r} cannot be read ({error.strerror}); valid: files that can'
    ) from None
  if fault := why_not_text(data) or ('' if data else 'is empty'):
    raise UserError(f'{field}: {path!r} {fault}; valid: non-empty UTF-8 text files')
  return data.decode()


def _python_files(root: pathlib.Path) -> dict[str, bytes]:
  """{path relative to `root`, with forward slashes: text} of the non-empty UTF-8 .py files."""

  def kept(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)

  documents = {}
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = filter(kept, subfolders)  # in place, so that the walk does not enter the rest
    for name in filter(kept, names):
      path = pathlib.Path(folder, name)
      if path.suffix == '.py' and not path.is_symlink():
        documents[path.relative_to(root).as_posix()] = path.read_bytes()
  return {path: text for path, text in documents.items() if text and not why_not_text(text)}


def _check_fractions(split: tuple[float, ...]) -> None:
  if not (
    len(split) == 3
    and all(fraction >= 0 for fraction in split)
    and math.isclose(sum(split), 1, abs_tol=1e-9)
    and split[0] > 0
    and split[1] > 0
  ):
    raise UserError(
      f'config.data.split {split!r}: valid: three fractions (train, validation, test) that sum to 1, '
      'the first two above 0, such as (0.9, 0.05, 0.05)'
    )
