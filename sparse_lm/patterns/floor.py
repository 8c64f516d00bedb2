"""Single weights, of which every neuron and every channel of a head keeps a few."""

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


@dataclasses.dataclass(frozen=True)
class Floor(Pattern):
  """The largest scores of a matrix, after the `least` largest of each of its channels; 'floor:N'.

  The channels of a matrix are those of the units that the model declares: the outputs of what enters
  hidden units or heads, the inputs of what leaves them. Other matrices have no floor. Among all masks of
  as many weights that hold the floor, this is one of the largest total score. The floor is of the mask: a
  soft threshold may still shrink a kept weight to zero.

  Attributes:
    least: weights that each channel keeps.
    axes: the path of each matrix with channels, and the axis that they follow each other on (-1 or -2).
  """

  least: int
  axes: tuple[tuple[str, int], ...] = ()
  spelling: ClassVar[str] = 'floor:4'

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Floor | None':
    """'floor:N' for any N from 1 on."""
    match = re.fullmatch(r'floor:([1-9]\d{0,8})', name)
    members = (member for group in declared for member in group.members)
    axes = {member.path: member.axis for member in members if member.axis is not None}
    return match and cls(int(match[1]), tuple(axes.items()))

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Only parameters of two axes or more."""
    return is_matrix(shape)

  def top_of(self, name: str) -> Callable[[Array, Array], Array] | None:
    """Selects in the matrix at the path `name`, where it has channels."""
    axis = dict(self.axes).get(name)
    return None if axis is None else functools.partial(self._top, axis)

  def _top(self, axis: int, units: Array, count: Array) -> Array:
    along = units.T if axis == -1 else units  # a channel is a row
    floor = topk_rows(along, self.least)
    return topk_mask(jnp.where(floor.T if axis == -1 else floor, jnp.inf, units), count)

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Whole counts of weights. Raises UserError for a count that the floors of all channels exceed."""
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
          f'{kept} weights of {path}, and its {channels} channels of at least {self.least} need '
          f'{needed} of {size}; valid: {fits}a lower floor'
        )
    return found
