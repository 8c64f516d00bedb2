"""The base class of patterns whose units are rectangular tiles: blocks, rows and columns of a matrix."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp

from sparse_lm.core.errors import UserError
from sparse_lm.core.units import Array, Pattern, Shapes, is_matrix, rounded_to_units


@dataclasses.dataclass(frozen=True)
class Tiles(Pattern):
  """Rectangular tiles of `rows` inputs and `columns` outputs; 0 means the whole axis."""

  rows: int
  columns: int

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether the parameter has at least two axes."""
    return is_matrix(shape)

  def _tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
    return self.rows or shape[-2], self.columns or shape[-1]

  def pool_leaf(self, path: str, leaf: Array) -> Array:
    """Returns the mean over each tile."""
    rows, columns = self._tile(leaf.shape)
    *lead, i, o = leaf.shape
    tiles = leaf.reshape(*lead, i // rows, rows, o // columns, columns)
    return jnp.mean(tiles, axis=(-3, -1), dtype=jnp.float32)

  def expand_leaf(self, units: Array, shape: tuple[int, ...]) -> Array:
    """Copies each tile's value to all of its weights."""
    rows, columns = self._tile(shape)
    return jnp.repeat(jnp.repeat(units, rows, axis=-2), columns, axis=-1)

  def check(self, shapes: Shapes) -> None:
    """Raises a UserError if the tiles do not divide a matrix evenly."""
    for path, shape in shapes.items():
      rows, columns = self._tile(shape)
      if shape[-2] % rows or shape[-1] % columns:
        common = math.gcd(shape[-2], shape[-1])
        raise UserError(
          f"config.weight.pattern='block:{rows}' does not divide {path} of {shape[-2]} x {shape[-1]}; "
          f'valid: a divisor of {common}, or another pattern'
        )

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds each density to whole tiles of its matrix."""
    found = {}
    for path, asked in density.items():
      rows, columns = self._tile(shapes[path])
      tiles = shapes[path][-2] // rows * (shapes[path][-1] // columns)
      found[path] = rounded_to_units(tiles, asked, path)
    return found
