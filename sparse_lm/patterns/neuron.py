"""Hidden units as units."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.spanning import SpanningUnits


@dataclasses.dataclass(frozen=True)
class Neuron(SpanningUnits):
  """Hidden units: a column of what enters an MLP and a row of what leaves it."""

  spelling: ClassVar[str] = 'neuron'
