"""Packed formats of kernels: each file defines one subclass of `core.format.Format`, found by name."""

from sparse_lm.core import discovery
from sparse_lm.core.format import Format


def names() -> list[str]:
  """Returns the names of all formats."""
  return discovery.names(__name__)


def load(name: str) -> type[Format]:
  """Returns the class in `inference/formats/<name>.py`. Raises a UserError if there is none."""
  return discovery.load(__name__, name, 'format')


def name_of(stored: Format) -> str:
  """Returns the name of a packed kernel's format."""
  return discovery.name_of(type(stored))
