"""As many inputs of every output."""

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
  """As many inputs of every output: a constant fan-in."""

  spelling: ClassVar[str] = 'per_output'

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Only parameters of two axes or more have such units."""
    return is_matrix(shape)

  def top(self, units: Array, count: Array) -> Array:
    """The same number of each column."""
    return topk_rows(units.T, kept_count(units.shape[0], count / units.size)).T

  def threshold(self, units: Array, keeps: Array) -> Array:
    """The largest dropped score of each column."""
    return largest_dropped(units, keeps, axis=0)

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Whole counts of each output's inputs."""
    return {path: rounded_to_units(shapes[path][-2], d, path) for path, d in density.items()}
