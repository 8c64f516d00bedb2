"""Attention heads."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Head(SpanningUnits):
  """A head is kept or dropped whole: its columns of query, key and value, and its rows of the output."""

  spelling: ClassVar[str] = 'head'
