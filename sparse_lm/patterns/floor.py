"""Single weights, with a minimum for each neuron and each channel of a head."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group
from sparse_lm.core.units import Array, Pattern, Shapes, is_matrix
from sparse_lm.kernels.topk import topk_mask, topk_rows

DISPLAY_NAME = 'at least {} for each channel'


@dataclasses.dataclass(frozen=True)
class Floor(Pattern):
  """Keeps the `least` largest scores of each channel, then the largest scores of the matrix; 'floor:N'.

  A channel is one hidden unit, or one channel of a head: its weights are a column of a matrix that
  produces it and a row of a matrix that reads it. Matrices without channels have no floor. Of all masks
  with the same number of weights and this floor, the mask has the largest total score. The floor counts
  weights of the mask; a soft threshold may still shrink a kept weight to zero.

  Attributes:
    least: minimum number of weights that each channel keeps.
    axes: the path of each matrix with channels, and the axis of its channels (-1 or -2).
  """

  least: int
  axes: tuple[tuple[str, int], ...] = ()
  spelling: ClassVar[str] = 'floor:4'

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Floor | None':
    """Recognises 'floor:N' with N at least 1."""
    match = re.fullmatch(r'floor:([1-9]\d{0,8})', name)
    members = (member for group in declared for member in group.members)
    axes = {member.path: member.axis for member in members if member.axis is not None}
    return match and cls(int(match[1]), tuple(axes.items()))

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """True for parameters of two axes or more."""
    return is_matrix(shape)

  def top_of(self, name: str) -> Callable[[Array, Array], Array] | None:
    """Returns the function that selects in the matrix at `name`; `None` if it has no channels."""
    axis = dict(self.axes).get(name)
    return None if axis is None else functools.partial(self._top, axis)

  def _top(self, axis: int, units: Array, count: Array) -> Array:
    along = units.T if axis == -1 else units  # a channel is a row
    floor = topk_rows(along, self.least)
    return topk_mask(jnp.where(floor.T if axis == -1 else floor, jnp.inf, units), count)

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds to whole weights. Raises UserError if a matrix keeps fewer weights than its floors need."""
    found = super().round_to_units(shapes, density)
    for path, axis in self.axes:
      if path not in found:
        continue
      size, channels = math.prod(shapes[path][-2:]), shapes[path][axis]
      kept, needed = round(found[path] * size), self.least * channels
      if needed > kept:
        fits = f'a sparsity of at most {1 - needed / size:.6g} there, or ' if needed <= size else ''
        raise UserError(
          f"config.weight.pattern 'floor:{self.least}': a sparsity of {1 - found[path]:.6g} leaves "
          f'{kept} of {size} weights of {path}, but its {channels} channels need at least {self.least} '
          f'each, {needed} in total; valid: {fits}a lower floor'
        )
    return found
