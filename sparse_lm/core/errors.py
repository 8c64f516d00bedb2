"""Bad input gets one clear line and exit code 2, before any long work starts."""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn


class UserError(Exception):
  """What the user can mend: the message names the field, the value and what would be valid."""


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


class Parser(argparse.ArgumentParser):
  """Arguments whose faults are a `UserError`: one line, with the nearest name."""

  def __init__(self, prog: str) -> None:
    super().__init__(prog=prog, allow_abbrev=False)

  def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for an argument that there is not, that lacks, or that has a wrong value."""
    known, rest = self.parse_known_args(args)
    if rest:
      raise unknown('argument', rest[0].partition('=')[0], self._option_string_actions)
    return known

  def error(self, message: str) -> NoReturn:
    """What argparse found."""
    raise UserError(message)


def one_line(main: Callable[[], None]) -> Callable[[], None]:
  """Wraps an entry point: a `UserError` becomes one line on stderr and exit code 2."""

  @functools.wraps(main)
  def wrapped() -> None:
    try:
      main()
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)

  return wrapped
