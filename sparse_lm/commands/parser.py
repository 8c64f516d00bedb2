"""Parsing arguments, and turning errors into one line on stderr and an exit code."""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from sparse_lm.core.errors import LONGEST_LINE, UserError, unknown


class Parser(argparse.ArgumentParser):
  """An argument parser that raises `UserError` and suggests the nearest name."""

  def __init__(self, prog: str) -> None:
    super().__init__(prog=prog, allow_abbrev=False)

  def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for unknown, missing or malformed arguments."""
    known, rest = self.parse_known_args(args)
    if rest:
      raise unknown('argument', rest[0].partition('=')[0], self._option_string_actions)
    return known

  def error(self, message: str) -> NoReturn:
    """Raises UserError with argparse's message."""
    raise UserError(message)


def local_path(text: str) -> str:
  """Converts an argument to a path. Parsers use it as the `type` of arguments for files and folders.

  It expands `~`, because shells do not expand it in `--workdir=~/x`, and refuses an empty path.
  """
  if not text:
    raise argparse.ArgumentTypeError("'' is not valid; valid: a file or a folder")
  return os.path.expanduser(text)


def one_line(main: Callable[[], None]) -> Callable[[], None]:
  """Wraps an entry point so that errors end in one line on stderr instead of a traceback.

  Exit codes:

  - 2: a `UserError`, an `OSError` (such as a full disk or a read-only folder), or output that the
    terminal's encoding cannot represent.
  - 130 (128 + SIGINT): Ctrl-C.
  - 141 (128 + SIGPIPE): the reader of the output is gone, as with `| head -1`. No line is printed.
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
      _exit('stopped; the same command continues or starts again', 128 + signal.SIGINT)
    except UserError as error:
      _exit(f'error: {error}', 2)
    except OSError as error:
      what = error.filename or 'a file or the output'
      _exit(f'error: {what}: {error.strerror or error}', 2)
    except UnicodeEncodeError as error:
      lacking = error.object[error.start : error.end]
      _exit(
        f'error: the encoding {error.encoding} of the output cannot represent {lacking!r}; valid: '
        'set PYTHONIOENCODING=utf-8',
        2,
      )

  return wrapped


@contextlib.contextmanager
def _no_lost_interrupt() -> Iterator[None]:
  """Repeats a Ctrl-C that arrives during a callback, such as JAX's for the garbage collector.

  Python prints a `KeyboardInterrupt` that is raised in such a callback, but does not pass it on. Without
  the repetition, the program would continue.
  """
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
  """Shortens a message to one line of at most `LONGEST_LINE` characters.

  Only the middle is cut, because a message begins with the field and ends with the valid values.
  """
  line = ' '.join(message.splitlines())
  if len(line) <= LONGEST_LINE:
    return line
  head = LONGEST_LINE * 2 // 3
  return f'{line[:head]} ... {line[head + 5 - LONGEST_LINE :]}'


def _exit(message: str, code: int) -> NoReturn:
  with contextlib.suppress(OSError):
    if message:
      print(shortened(message), file=sys.stderr, flush=True)
  # Python flushes both streams again when it exits, and would print an error if that fails.
  for stream in filter(None, (sys.stdout, sys.stderr)):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  sys.exit(code)
