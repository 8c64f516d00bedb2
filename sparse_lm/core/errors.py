"""Errors that a user can fix."""

import contextlib
import difflib
import pathlib
import traceback
from collections.abc import Iterable, Iterator


class UserError(Exception):
  """An error that the user can fix; its message names the field, the value and the valid values."""


class Diverged(UserError):
  """The loss, a gradient or a score of a run is not finite. Training the run again would not help."""


def unknown(what: str, name: object, valid: Iterable[str]) -> UserError:
  """Returns a `UserError` for a name that is not among `valid`; it suggests the nearest match."""
  valid = sorted(valid)
  near = [long for long in valid if _abbreviated(long) == name]
  near += difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return UserError(f'unknown {what} {name!r}: {hint}valid: {", ".join(valid)}')


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
