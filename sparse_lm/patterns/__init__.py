"""Patterns: which weights are kept or dropped together. Each pattern is one file.

A file defines one subclass of `core.units.Pattern`. Its `parse` recognises its spellings in
`config.weight.pattern`.
"""

import functools

from sparse_lm.core import discovery
from sparse_lm.core.errors import unknown
from sparse_lm.core.groups import Group
from sparse_lm.core.units import Pattern


def spellings() -> list[str]:
  """Returns one spelling of each pattern, such as 'row' or '2:4'."""
  return [cls.spelling for cls in _classes()]


@functools.cache
def pattern(name: str, declared: tuple[Group, ...] = ()) -> Pattern:
  """Returns the pattern that `name` spells.

  Args:
    name: a spelling such as 'unstructured', '2:4' or 'block:16'.
    declared: the units that span several matrices, as the model declares them.

  Raises UserError for unknown or malformed names, and if the model has no such units.
  """
  for cls in _classes():
    if (found := cls.parse(name, declared)) is not None:
      return found
  raise unknown('config.weight.pattern', name, spellings())


def _classes() -> list[type[Pattern]]:
  return [discovery.load(__name__, name, 'pattern') for name in discovery.names(__name__)]
