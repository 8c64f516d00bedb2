"""Unstructured sparsity: single weights, ranked within their matrix."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.units import Pattern


@dataclasses.dataclass(frozen=True)
class Unstructured(Pattern):
  """Keeps any set of single weights of a matrix."""

  spelling: ClassVar[str] = 'unstructured'

  @property
  def inputs_per_group(self) -> int:
    """1: weights are ranked one by one."""
    return 1

  @property
  def unconstrained(self) -> bool:
    """True: any set of a matrix's weights may be kept."""
    return True
