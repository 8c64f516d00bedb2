"""Whole layers as units."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Layer(SpanningUnits):
  """Whole layers: every weight of their attention and of their MLP."""

  spelling: ClassVar[str] = 'layer'

  @property
  def spans_layers(self) -> bool:
    """The layers are ranked against each other."""
    return True
