"""Errors that a user can fix."""

import contextlib
import difflib
import pathlib
import traceback
from collections.abc import Iterable, Iterator, Sequence

LONGEST_LINE = 300  # characters of a message that a command prints


class UserError(Exception):
  """An error that the user can fix; its message names the field, the value and the valid values."""


class Diverged(UserError):
  """The loss, a gradient or a score of a run is not finite. Training the run again would not help."""


def unknown(what: str, name: object, valid: Iterable[str]) -> UserError:
  """Returns a `UserError` for a name that is not among `valid`; it suggests the nearest match.

  If a line has no room for all valid names, the error shows the closest ones and counts the others.
  """
  valid = sorted(valid)
  near = [long for long in valid if _abbreviated(long) == name]
  near += difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  message = f'unknown {what} {name!r}: {hint}valid: '
  room = LONGEST_LINE - len('error: ') - len(message)
  return UserError(message + listed(valid, str(name), room))


def listed(names: Sequence[str], near: str = '', room: int = LONGEST_LINE // 2) -> str:
  """Joins names by commas, in their order. A long list is cut to some names and the number of the others.

  Args:
    names: the names.
    near: the name that was given; the names of a cut list are those closest to it.
    room: characters that a list may have; a cut list has at least one name.
  """
  whole = ', '.join(names)
  if len(whole) <= room:
    return whole
  closest = sorted(
    names, key=lambda name: difflib.SequenceMatcher(None, near, name).ratio(), reverse=True
  )
  for count in range(len(names) - 1, 0, -1):
    shown = set(closest[:count])
    text = ', '.join(name for name in names if name in shown) + f' and {len(names) - count} more'
    if len(text) <= room or count == 1:
      return text
  return whole


def _abbreviated(name: str) -> str:
  """Shortens the last part to its initials: 'optimizer.learning_rate' becomes 'optimizer.lr'."""
  group, dot, last = name.rpartition('.')
  return group + dot + ''.join(word[0] for word in last.split('_') if word)


def require(condition: bool, field: str, value: object, valid: str) -> None:
  """Raises a `UserError` that names the field, the value and what is valid, unless `condition`."""
  if not condition:
    raise UserError(f'{field}={value!r} is not valid; valid: {valid}')


def located(error: Exception, file: str) -> str:
  """Formats an error that code in the user's file raised in one line, with the number of its line."""
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
  line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
  message = ' '.join(str(error).split())
  return f'fails{f" in line {line}" if line else ""}: {type(error).__name__}: {message}'


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[None]:
  """Turns an `OSError` raised in the block into a `UserError` that names `path`.

  The operating system's own error often names no file: `write` reports a full disk without a path.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror or error}); valid: a writable folder with free space'
    ) from error
