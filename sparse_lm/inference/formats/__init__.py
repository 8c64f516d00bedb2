"""Packed formats: how what is left of a kernel is stored and multiplied. One file each, found by name.

A file defines one subclass of `core.format.Format`.
"""

from sparse_lm.core import discovery
from sparse_lm.core.format import Format


def names() -> list[str]:
  """The names of all formats."""
  return discovery.names(__name__)


def load(name: str) -> type[Format]:
  """The class in `inference/formats/<name>.py`. Raises UserError where there is none."""
  return discovery.load(__name__, name, 'format')


def name_of(stored: Format) -> str:
  """The name of the format that a kernel is stored in."""
  return discovery.name_of(type(stored))
