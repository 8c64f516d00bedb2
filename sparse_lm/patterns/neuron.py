"""Hidden units of MLPs (neurons)."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Neuron(SpanningUnits):
  """A hidden unit is kept or dropped whole: its column in each input matrix, its row in the output matrix."""

  spelling: ClassVar[str] = 'neuron'
