"""N:M sparsity: N of each M consecutive inputs, as sparse tensor cores need it."""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group
from sparse_lm.core.units import Array, Pattern, Shapes, is_matrix, largest_dropped


@dataclasses.dataclass(frozen=True)
class NOfM(Pattern):
  """Keeps `n` of each `m` consecutive inputs, or more of them while a ramp is denser than n / m."""

  n: int
  m: int
  spelling: ClassVar[str] = '2:4'

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'NOfM | None':
    """Recognises 'N:M'. Raises UserError if N is greater than M."""
    match = re.fullmatch(r'(\d{1,9}):(\d{1,9})', name)
    if match is None:
      return None
    n, m = map(int, match.groups())
    if not 1 <= n <= m:
      raise UserError(f'config.weight.pattern {name!r}: valid: N:M with 1 <= N <= M')
    return cls(n, m)

  @property
  def inputs_per_group(self) -> int:
    """M: the masks of a group are chosen together."""
    return self.m

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """True for parameters of two axes or more."""
    return is_matrix(shape)

  def top(self, units: Array, count: Array) -> Array:
    """Selects the largest scores of each group, the same number in all groups."""
    each = jnp.clip(jnp.round(count * (self.m / units.size)), 1, self.m)
    group = units.reshape(-1, self.m, units.shape[-1])
    # The rank of an entry is the number of entries in its group that are larger, or equal and earlier.
    mine, other = group[:, :, None], group[:, None, :]
    index = jnp.arange(self.m)
    earlier = (index[None, :] < index[:, None])[None, :, :, None]
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2)
    return (rank < each).reshape(units.shape)

  def threshold(self, units: Array, keeps: Array) -> Array:
    """Returns the largest dropped score of each group."""
    groups = (-1, self.m, units.shape[-1])
    largest = largest_dropped(units.reshape(groups), keeps.reshape(groups), axis=1)
    return jnp.repeat(largest, self.m, axis=1).reshape(units.shape)

  def check(self, shapes: Shapes) -> None:
    """Raises UserError unless `m` divides every input axis."""
    for path, shape in shapes.items():
      if shape[-2] % self.m:
        raise UserError(
          f"config.weight.pattern '{self.n}:{self.m}': {self.m} doesn't divide the {shape[-2]} inputs "
          f'of {path}; valid: a divisor'
        )

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Accepts the densities n/m and 1. Raises UserError for any other."""
    for path, asked in density.items():
      if asked < 1 and abs(asked - self.n / self.m) > 1e-6:
        raise UserError(
          f"config.weight.pattern '{self.n}:{self.m}' cannot express a sparsity of {1 - asked:.4g} "
          f'(of {path}); valid: config.weight.sparsity={1 - self.n / self.m:.6g} with '
          "config.weight.distribution='uniform'"
        )
    return dict(density)
