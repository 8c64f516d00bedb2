"""A constant fan-in: the same number of weights for each output."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from sparse_lm.core.units import (
  Array,
  Pattern,
  Shapes,
  is_matrix,
  kept_count,
  largest_dropped,
  rounded_to_units,
)
from sparse_lm.kernels.topk import topk_rows


@dataclasses.dataclass(frozen=True)
class PerOutput(Pattern):
  """Keeps the same number of weights for each output (a constant fan-in)."""

  spelling: ClassVar[str] = 'per_output'

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """True for parameters of two axes or more."""
    return is_matrix(shape)

  def top(self, units: Array, count: Array) -> Array:
    """Selects the largest scores of each output, the same number for all outputs."""
    return topk_rows(units.T, kept_count(units.shape[0], count / units.size)).T

  def threshold(self, units: Array, keeps: Array) -> Array:
    """Returns the largest dropped score of each output."""
    return largest_dropped(units, keeps, axis=0)

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds to a whole number of weights for each output."""
    return {path: rounded_to_units(shapes[path][-2], d, path) for path, d in density.items()}
