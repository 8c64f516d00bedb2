"""Attention heads as units."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Head(SpanningUnits):
  """Attention heads: columns of query, key and value and rows of the output projection."""

  spelling: ClassVar[str] = 'head'
