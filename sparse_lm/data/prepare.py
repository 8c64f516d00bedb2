"""Converts local text to a TFDS directory, without TensorFlow.

`python -m sparse_lm.data.prepare --out=DIR --kind=text|wikitext PATH ...` writes `DIR/<kind>/1.0.0` in
the format array_record, under a temporary name until it is complete. Train on it with
`--config.data.source=tfds`. Nothing is downloaded.

- `text`: each file is divided among the splits, and each part is one example. The corpus is byte for byte
  the same as with `--config.data.source=files` for these files.
- `wikitext`: each article is one example. PATH is a folder with the files, or the files themselves
  (`wiki.train.tokens`, `wiki.valid.raw`, `test.txt`, ...). Files with other names can be given by
  `--train=FILE`, `--validation=FILE` and `--test=FILE`.
"""

import contextlib
import io
import pathlib
import re
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError
from sparse_lm.data import sources
from sparse_lm.data.corpus import SPLITS

KINDS = ('text', 'wikitext')

_WIKITEXT = {
  split: (f'wiki.{name}.tokens', f'wiki.{name}.raw', f'{name}.txt')
  for split, name in zip(SPLITS, ('train', 'valid', 'test'))
}
# A title, ` = Title = `, between blank lines. (Formulas look the same, but have text around them.) Line
# ends, \n or \r\n, are kept.
_ARTICLE = re.compile(r'^(?= ?\r?\n = [^=\r\n]+ = \r?\n ?\r?\n)', re.MULTILINE)


class _Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A TFDS builder with one feature, `text`, that writes documents in order."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, name: str, documents: dict[str, list[bytes]], out: pathlib.Path) -> None:
    self.name, self._documents = name, documents
    super().__init__(data_dir=out, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
    # Documents must stay in order, but TFDS would shuffle them.
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    return {split: self._generate_examples(split) for split in SPLITS if self._documents[split]}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, bytes]]]:
    yield from enumerate({'text': text} for text in self._documents[split])


def prepare(out: str, name: str, documents: dict[str, list[bytes]]) -> pathlib.Path:
  """Writes each UTF-8 document as one example; splits without documents are omitted.

  Returns:
    The absolute path of `out/name/1.0.0`.

  Raises:
    UserError: this folder exists or cannot be written.
  """
  try:
    root = pathlib.Path(out).expanduser().absolute()
  except RuntimeError as error:
    raise UserError(f'--out={out}: {error}; valid: a folder to write to') from None
  try:
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
      # TFDS prints about downloads on stdout although it downloads nothing; progress bars use stderr.
      builder = _Documents(name, documents, root)
      if builder.data_path.exists():
        raise UserError(f'{builder.data_path} already exists; valid: another --out, or remove it')
      builder.download_and_prepare(download_dir=downloads)
  # TFDS reports a full disk as a RuntimeError with several lines.
  except (OSError, RuntimeError) as error:
    reason = str(error).strip().partition('\n')[0]
    raise UserError(
      f'--out={out} cannot be written: {reason}; valid: a writable folder with free space'
    ) from error
  return pathlib.Path(builder.data_path)


def text(patterns: list[str]) -> dict[str, list[bytes]]:
  """Cuts each matching file into splits; returns the parts by split. Raises as `sources.files` does."""
  paths = sorted({path for pattern in patterns for path in sources.matching(pattern, 'PATH')})
  return sources.cut(paths, sources.FRACTIONS, 'PATH')


def wikitext(files: dict[str, str]) -> dict[str, list[bytes]]:
  """Returns the articles of each split's file; a missing test split is empty.

  Raises:
    UserError: there is no train or validation file, or a file has no article.
  """
  for split in SPLITS[:2]:
    if split not in files:
      raise UserError(
        f'--kind=wikitext has no {split} file; valid: {", ".join(_WIKITEXT[split])}, or --{split}=FILE'
      )
  return {split: _articles(files[split], split) if split in files else [] for split in SPLITS}


def wikitext_files(paths: list[str]) -> dict[str, str]:
  """Finds the file of each split, by name, among files and folders.

  Raises:
    UserError: a file has another name, or a split has two files.
  """
  split_of = {name: split for split, names in _WIKITEXT.items() for name in names}
  found: dict[str, str] = {}
  for path in map(pathlib.Path, paths):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    if not path.is_dir() and path.name not in split_of:
      raise UserError(
        f'PATH {str(path)!r} is neither a folder nor a file with a name of WikiText; valid: '
        f'{", ".join(split_of)}, or --train=FILE, --validation=FILE, --test=FILE'
      )
    for file in files:
      split = split_of.get(file.name)
      if split in found:
        raise UserError(f'PATH: {found[split]} and {file} are both {split}; valid: one of them')
      if split:
        found[split] = str(file)
  return found


def _articles(path: str, split: str) -> list[bytes]:
  field = f'--{split}'
  if not pathlib.Path(path).is_file():
    raise UserError(f'{field}={path} is not a file; valid: a WikiText file')
  text = sources.read_text(path, field)
  if not _ARTICLE.search(text):
    raise UserError(
      f"{field}={path} has no article (a line ' = Title = ' between blank ones); valid: WikiText, or "
      '--kind=text'
    )
  return [article.encode() for article in _ARTICLE.split(text) if article.strip()]


def _parser() -> Parser:
  parser = Parser('python -m sparse_lm.data.prepare')
  parser.add_argument(
    '--out', type=local_path, required=True, help='the data is written to OUT/KIND/1.0.0'
  )
  parser.add_argument('--kind', required=True, choices=KINDS)
  for split in SPLITS:
    parser.add_argument(
      f'--{split}', type=local_path, metavar='FILE', help=f'{split} file of wikitext'
    )
  parser.add_argument(
    'paths',
    type=local_path,
    nargs='*',
    metavar='PATH',
    help='text: files or globs; wikitext: a folder or files',
  )
  return parser


@one_line
def main() -> None:
  """Prepares local text, and prints its path and how to train on it."""
  given = _parser().parse_args()
  named = {split: file for split in SPLITS if (file := getattr(given, split))}
  if given.kind == 'text':
    if named or not given.paths:
      raise UserError(
        '--kind=text needs files; valid: one or more PATH, without --train, --validation and --test'
      )
    documents = text(given.paths)
  else:
    documents = wikitext(wikitext_files(given.paths) | named)
  folder = prepare(given.out, given.kind, documents)
  sizes = ', '.join(f'{split} {len(texts)}' for split, texts in documents.items())
  print(f'{folder}: examples: {sizes}')
  print(f'train on it with --config.data.source=tfds --config.data.path={folder}')


if __name__ == '__main__':
  main()
