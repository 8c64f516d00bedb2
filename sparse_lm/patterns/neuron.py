"""Hidden units of MLPs (neurons)."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Neuron(SpanningUnits):
  """A hidden unit is kept or dropped whole: its columns of the input matrices, its row of the output."""

  spelling: ClassVar[str] = 'neuron'
