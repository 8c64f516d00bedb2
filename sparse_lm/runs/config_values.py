"""Conversion of the values of config fields to the types of their defaults."""

import ast
import contextlib

from sparse_lm.core import ranges
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import FieldValue


def convert(field: str, value: object, default: FieldValue) -> FieldValue:
  """Converts `value` to the type of `default`. An int is a valid float, and a list a valid tuple."""
  if isinstance(value, str) and not isinstance(default, str):
    text = {'true': 'True', 'false': 'False'}.get(value.lower(), value)
    try:
      value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
      raise wrong_type(field, value, default) from None
  if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
    with contextlib.suppress(OverflowError):  # an int beyond the largest float is refused below
      value = float(value)
  if isinstance(default, tuple) and isinstance(value, list | tuple):
    value = tuple(convert(field, item, default[0]) if default else item for item in value)
  if type(value) is not type(default):
    raise wrong_type(field, value, default)
  return value


def wrong_type(field: str, value: object, default: object) -> UserError:
  """Returns the error that a field's value is not of its default's type."""
  return UserError(
    f'config.{field}={ranges.shown(value)} is not of type {type(default).__name__}, such as {default!r}'
  )
