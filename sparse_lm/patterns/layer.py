"""Whole layers."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Layer(SpanningUnits):
  """A layer is kept or dropped whole: all weights of its attention and its MLP."""

  spelling: ClassVar[str] = 'layer'

  @property
  def spans_layers(self) -> bool:
    """True: layers are ranked against each other."""
    return True
