"""Rows: all weights of an input."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Row(Tiles):
  """All weights of an input are kept or dropped together."""

  rows: int = 1
  columns: int = 0
  spelling: ClassVar[str] = 'row'
