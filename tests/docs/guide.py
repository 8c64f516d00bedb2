"""Executes the code of a guide: `python tests/docs/guide.py docs/guides/train.md [FOLDER]`.

The blocks run in order, in a fresh copy of the checkout, as a user would run them:

- `python` blocks share one namespace.
- `sh` blocks run in bash, which stops at the first command that fails.
- `{code-block}` directives with a `:caption:` are files, written to the path in the caption.
- A `text` block right after a `python` or `sh` block is its expected output: `...` stands for any text
  (alone on a line, for any lines), decimal numbers match within 2 %, and runs of spaces count as one.

Blocks in other languages are not executed.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator

import markdown_it

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a checkout consists of, as far as guides use it.
CHECKOUT = ('sparse_lm', 'experiments', 'configs')
TOLERANCE = 0.02
DECIMAL = re.compile(r'(?<![\w.])[-+]?\d[\d,]*(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?!\w)')


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block: its language, its text, its first line in the guide, and the path in its caption."""

  language: str
  text: str
  line: int
  path: str = ''


class GuideError(AssertionError):
  """A block failed, or its output differs from the expected one."""


def blocks(markdown: str) -> Iterator[Block]:
  """Yields the fenced blocks of a guide in order."""
  for token in markdown_it.MarkdownIt('commonmark').parse(markdown):
    if token.type != 'fence':
      continue
    info, line = token.info.strip(), token.map[0] + 2
    if not (directive := re.fullmatch(r'\{code-block\}\s*(\S*)', info)):
      yield Block(info, token.content, line)
      continue
    options = re.match(r'(?::[\w-]+:.*\n)*\n?', token.content)[0]
    if not (caption := re.search(r'^:caption:\s*(\S+)$', options, re.MULTILINE)):
      raise GuideError(f'line {line}: a code-block needs a :caption: that names its file')
    text = token.content[len(options) :]
    yield Block(directive[1], text, line + options.count('\n'), caption[1])


def matches(expected: str, printed: str) -> bool:
  """True if a line of output is the expected one, up to `...` and 2 % of decimal numbers."""
  expected, printed = (' '.join(line.split()) for line in (expected, printed))
  pieces = re.split(rf'(\.\.\.|{DECIMAL.pattern})', expected)
  pattern = ''.join(
    '(?:.*)' if piece == '...' else f'({DECIMAL.pattern})' if i % 2 else re.escape(piece)
    for i, piece in enumerate(pieces)
  )
  if not (found := re.fullmatch(pattern, printed)):
    return False
  wanted = [piece for piece in pieces[1::2] if piece != '...']
  return all(map(_close, wanted, found.groups()))


def _close(expected: str, printed: str) -> bool:
  wanted, got = (float(number.replace(',', '')) for number in (expected, printed))
  decimals = re.search(r'\.(\d+)$', expected)
  last_digit = 10.0 ** -len(decimals[1]) if decimals else 0.0
  return abs(wanted - got) <= max(TOLERANCE * abs(wanted), 1.001 * last_digit)


def check_output(expected: str, printed: str) -> None:
  """Raises GuideError if the lines printed are not the expected ones."""
  wanted, got = expected.rstrip().splitlines(), printed.rstrip().splitlines()

  def fits(i: int, j: int) -> bool:
    if i == len(wanted):
      return j == len(got)
    if wanted[i].strip() == '...':
      return any(fits(i + 1, k) for k in range(j, len(got) + 1))
    return j < len(got) and matches(wanted[i], got[j]) and fits(i + 1, j + 1)

  if not fits(0, 0):
    difference = '\n'.join(difflib.unified_diff(wanted, got, 'expected', 'printed', lineterm=''))
    raise GuideError(f'the output differs from the expected one:\n{difference}')


class Guide:
  """A guide that runs in a folder, with what its blocks share."""

  def __init__(self, path: pathlib.Path, folder: pathlib.Path):
    self.path = path
    self.folder = folder
    self.module = types.ModuleType('guide')
    self.printed: str | None = None

  def run(self) -> None:
    """Runs all blocks; an error names the line of the guide."""
    sys.modules['guide'] = self.module
    for block in blocks(self.path.read_text(encoding='utf-8')):
      try:
        self._run(block)
      except Exception as error:
        raise GuideError(f'{self.path}, line {block.line}: {error}') from error

  def _run(self, block: Block) -> None:
    before, self.printed = self.printed, None
    if block.path:
      file = self.folder / block.path
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(block.text, encoding='utf-8')
    elif block.language == 'python':
      self.printed = self._python(block)
    elif block.language == 'sh':
      self.printed = self._shell(block)
    elif block.language == 'text' and before is not None:
      check_output(block.text, before)

  def _python(self, block: Block) -> str:
    # Tracebacks then name the guide and the line in it.
    code = compile('\n' * (block.line - 1) + block.text, str(self.path), 'exec')
    with contextlib.redirect_stdout(io.StringIO()) as output:
      exec(code, vars(self.module))
    return output.getvalue()

  def _shell(self, block: Block) -> str:
    # `python` is the interpreter of this process, and finds the packages of the copy.
    bin_folder = str(pathlib.Path(sys.executable).parent)
    environment = os.environ | {
      'PATH': f'{bin_folder}{os.pathsep}{os.environ["PATH"]}',
      'PYTHONPATH': str(self.folder),
    }
    command = ['bash', '-euo', 'pipefail', '-c', block.text]
    done = subprocess.run(
      command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
      raise GuideError(f'exit code {done.returncode}\n{done.stdout}{done.stderr}')
    return done.stdout


def copy_checkout(folder: pathlib.Path) -> None:
  """Copies the packages of this checkout into a folder, where a guide may add files to them."""
  for name in CHECKOUT:
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))


def main() -> None:
  """Runs the guide named on the command line, in the folder given or in a temporary one."""
  path = pathlib.Path(sys.argv[1]).resolve()
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(
      sys.argv[2] if len(sys.argv) > 2 else stack.enter_context(tempfile.TemporaryDirectory())
    ).resolve()
    copy_checkout(folder)
    os.chdir(folder)
    os.environ.setdefault('MPLBACKEND', 'agg')
    sys.path[0] = str(folder)
    Guide(path, folder).run()


if __name__ == '__main__':
  main()
