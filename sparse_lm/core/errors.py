"""Failures that a user can mend."""

import contextlib
import difflib
import pathlib
from collections.abc import Iterable, Iterator


class UserError(Exception):
  """What the user can mend: the message names the field, the value and what would be valid."""


class Diverged(UserError):
  """A loss or a gradient of a run is no longer finite: trained again, it would diverge again."""


def unknown(what: str, name: object, valid: Iterable[str]) -> UserError:
  """A `UserError` for a name that is not among `valid`, with the nearest match suggested."""
  valid = sorted(valid)
  near = [long for long in valid if _abbreviated(long) == name]
  near += difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  return UserError(f'unknown {what} {name!r}: {hint}valid: {", ".join(valid)}')


def _abbreviated(name: str) -> str:
  """'config.optimizer.lr' for 'config.optimizer.learning_rate': its last part by initials."""
  group, dot, last = name.rpartition('.')
  return group + dot + ''.join(word[0] for word in last.split('_') if word)


def require(condition: bool, field: str, value: object, valid: str) -> None:
  """Raises a `UserError` that says what would be valid, unless `condition`."""
  if not condition:
    raise UserError(f'{field}={value!r} is not valid; valid: {valid}')


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[None]:
  """Turns an `OSError` of the block into a `UserError` that names `path`; the operating system's own
  error often names no file (a full disk is noticed by `write`, which knows none)."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror or error}); valid: a folder of yours, with room'
    ) from error
