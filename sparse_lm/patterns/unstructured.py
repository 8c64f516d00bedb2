"""Single weights, ranked within their matrix."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.units import Pattern


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
  """Any weights of a matrix may be kept."""

  spelling: ClassVar[str] = 'unstructured'

  @property
  def lookahead(self) -> int:
    """Weights are ranked one by one."""
    return 1

  @property
  def unconstrained(self) -> bool:
    """Any weights of a matrix may be kept."""
    return True
