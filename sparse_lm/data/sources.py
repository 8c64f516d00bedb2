"""Sources of text: the Python standard library (the default) or local data.

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
TEST_ONLY = (0, 0, 1)

_HELD_OUT_BYTES = 100_000  # size of each held-out split of the standard library
_LARGEST_HELD_OUT_FILE = 50_000  # so that no single file dominates a held-out split
# Omits test suites, installed packages, and files that differ between machines. `encodings` has about a
# hundred near copies of one table, which would measure memorization in a held-out split.
_LEFT_OUT = {'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
_LEFT_OUT |= {'site-packages', 'dist-packages'}
_LEFT_OUT_PREFIXES = ('test_', '_sysconfigdata', 'sitecustomize', 'usercustomize')


def load(config: ConfigDict) -> Corpus:
  """Loads the corpus that `config.source`, `config.path` and `config.split` describe.

  Args:
    config: `config.data`.

  Raises:
    UserError: the source is unknown, or cannot be read (see `files`, `prepared.read` and `mixture.load`).
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
  """Reads the source code of this Python's standard library, about 11 MB on every machine.

  Whole files are held out, chosen by a hash of their relative paths. So the split does not depend on
  Python's location or the order of the file system. It does depend on the Python version, which is
  recorded in the card.
  """
  documents = _python_files(pathlib.Path(sysconfig.get_path('stdlib')))
  if not documents:
    raise UserError(
      "config.data.source='stdlib': this Python has no .py files of its standard library; "
      "valid: config.data.source='files' with local text in config.data.path"
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
  """Reads local UTF-8 text files (`~` and `**` are expanded); each file is cut at the same fractions.

  Raises:
    UserError: `split` is not three fractions that sum to 1, no file matches, or `cut` raised an error.
  """
  _check_fractions(split)
  if not path_glob:
    raise UserError(
      "config.data.source='files' needs config.data.path; valid: a text file or a glob such as ~/text/*"
    )
  paths = matching(path_glob)
  origin = {'source': 'files', 'path': path_glob, 'split': list(split), 'files': len(paths)}
  return join(cut(paths, split), origin)


def matching(path_glob: str, field: str = 'config.data.path') -> list[str]:
  """Returns the files that a glob matches, sorted.

  Existing folders and files are taken literally, even if their names contain brackets or a star.

  Raises:
    UserError: no file matches; the message names `field`.
  """
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
  """Divides each file among the splits; returns the parts by split.

  Positions are counted in characters, as nanoGPT and TFDS do for tiny Shakespeare. Every file is in every
  split, so the splits have the same proportions of files.

  Raises:
    UserError: a file is empty or not UTF-8 text, or a split with a fraction above 0 would be empty. The
      message names `field`.
  """
  members: dict[str, list[bytes]] = {name: [] for name in SPLITS}
  for path in paths:
    text = read_text(path, field)
    # 0.7 + 0.1 is slightly below 0.8; the small term prevents that such a cut loses a character.
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
  """Reads a text file; a `UserError` names `field` if it is unreadable, empty or not UTF-8."""
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f'{field}: {path!r} cannot be read ({error.strerror}); valid: readable files'
    ) from None
  if fault := why_not_text(data) or ('' if data else 'is empty'):
    raise UserError(f'{field}: {path!r} {fault}; valid: non-empty UTF-8 text files')
  return data.decode()


def _python_files(root: pathlib.Path) -> dict[str, bytes]:
  """Returns the non-empty UTF-8 .py files, by path relative to `root` with forward slashes."""

  def kept(name: str) -> bool:
    return name not in _LEFT_OUT and not name.startswith(_LEFT_OUT_PREFIXES)

  documents = {}
  for folder, subfolders, names in os.walk(root):
    subfolders[:] = filter(kept, subfolders)  # in place, so that the walk skips the others
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
    and ((split[0] > 0 and split[1] > 0) or tuple(split) == TEST_ONLY)
  ):
    raise UserError(
      f'config.data.split={split!r} is not valid; valid: three fractions (train, validation, test) that '
      'sum to 1, the first two above 0, such as (0.9, 0.05, 0.05); or (0, 0, 1), a text that is only '
      'evaluated'
    )
