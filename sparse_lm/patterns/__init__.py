"""Patterns: which sets of weights may be kept. One file each, found by name.

A file defines one subclass of `core.units.Pattern`, and its `parse` says which spellings of
`config.weight.pattern` are its own.
"""

import functools

from sparse_lm.core import discovery
from sparse_lm.core.errors import unknown
from sparse_lm.core.groups import Group
from sparse_lm.core.units import Pattern


def spellings() -> list[str]:
  """One way to write each pattern, such as 'row' or '2:4'."""
  return [cls.spelling for cls in _classes()]


@functools.cache
def pattern(name: str, declared: tuple[Group, ...] = ()) -> Pattern:
  """The pattern that `name` spells.

  Args:
    name: such as 'unstructured', '2:4' or 'block:16'.
    declared: the units that span matrices, as the model declares them.

  Raises UserError for an unknown name, or one that is malformed or that the model has no units for.
  """
  for cls in _classes():
    if (found := cls.parse(name, declared)) is not None:
      return found
  raise unknown('config.weight.pattern', name, spellings())


def _classes() -> list[type[Pattern]]:
  return [discovery.load(__name__, name, 'pattern') for name in discovery.names(__name__)]
