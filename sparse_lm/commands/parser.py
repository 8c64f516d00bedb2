"""Every failure that a user can mend is one clear line and an exit code, whichever command failed."""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from sparse_lm.core.errors import UserError, unknown

LONGEST_LINE = 300  # characters


class Parser(argparse.ArgumentParser):
  """Arguments whose faults are a `UserError`: one line, with the nearest name."""

  def __init__(self, prog: str) -> None:
    super().__init__(prog=prog, allow_abbrev=False)

  def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for unknown, missing or malformed arguments."""
    known, rest = self.parse_known_args(args)
    if rest:
      raise unknown('argument', rest[0].partition('=')[0], self._option_string_actions)
    return known

  def error(self, message: str) -> NoReturn:
    """What argparse found."""
    raise UserError(message)


def local_path(text: str) -> str:
  """The type of a `Parser`'s argument that names a file or a folder: shells leave the `~` of
  `--workdir=~/x` as it is, so it is expanded here. An empty path is refused."""
  if not text:
    raise argparse.ArgumentTypeError("'' is not valid; valid: a file or a folder")
  return os.path.expanduser(text)


def one_line(main: Callable[[], None]) -> Callable[[], None]:
  """Wraps an entry point, so that it ends in at most one line on stderr instead of a traceback.

  Exit code 2: a `UserError`, an `OSError` (a full disk, a read-only folder, a name that is too long)
  or text that the encoding of the output does not have. 130 (128 + SIGINT): Ctrl-C. 141 (128 +
  SIGPIPE), and no line: nobody reads the output any more, as behind `| head -1`.
  """

  @functools.wraps(main)
  def wrapped() -> None:
    try:
      try:
        with _no_lost_interrupt():
          main()
      finally:
        if sys.stdout is not None:  # closed by `>&-`
          sys.stdout.flush()
    except BrokenPipeError:
      _exit('', 128 + signal.SIGPIPE)
    except KeyboardInterrupt:
      _exit('stopped; the same command continues, or starts over', 128 + signal.SIGINT)
    except UserError as error:
      _exit(f'error: {error}', 2)
    except OSError as error:
      what = error.filename or 'a file or the output'
      _exit(f'error: {what}: {error.strerror or error}', 2)
    except UnicodeEncodeError as error:
      lacking = error.object[error.start : error.end]
      _exit(
        f'error: the output has the encoding {error.encoding}, which cannot hold {lacking!r}; valid: '
        'set PYTHONIOENCODING=utf-8',
        2,
      )

  return wrapped


@contextlib.contextmanager
def _no_lost_interrupt() -> Iterator[None]:
  """Repeats a Ctrl-C that came within a callback (JAX has one for the garbage collector), where Python
  can only print `KeyboardInterrupt` and forget it."""
  hook = sys.unraisablehook

  def repeat(raised: 'sys.UnraisableHookArgs') -> None:
    if raised.exc_type is KeyboardInterrupt:
      main = threading.main_thread().ident
      threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
      hook(raised)

  sys.unraisablehook = repeat
  try:
    yield
  finally:
    sys.unraisablehook = hook


def shortened(message: str) -> str:
  """`message` as one line of at most `LONGEST_LINE` characters. The middle is left out: it begins
  with the field and ends with what would be valid."""
  line = ' '.join(message.splitlines())
  if len(line) <= LONGEST_LINE:
    return line
  head = LONGEST_LINE * 2 // 3
  return f'{line[:head]} ... {line[head + 5 - LONGEST_LINE :]}'


def _exit(message: str, code: int) -> NoReturn:
  with contextlib.suppress(OSError):
    if message:
      print(shortened(message), file=sys.stderr, flush=True)
  # Python flushes both once more as it ends, and would complain about what cannot be written.
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  sys.exit(code)
