"""Columns: all weights of an output."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.tiles import Tiles


@dataclasses.dataclass(frozen=True)
class Column(Tiles):
  """All weights of an output are kept or dropped together."""

  rows: int = 0
  columns: int = 1
  spelling: ClassVar[str] = 'column'
