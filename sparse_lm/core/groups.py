"""Groups of units that span several matrices.

For example, a neuron is a column of `up` and a row of `down`. A head is a set of columns of the query,
key and value projections and a set of rows of the output projection. The module that owns the matrices
declares its groups while it is traced (`plan/record.py`). Patterns, learned masks and the removal of
units read these declarations.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Member:
  """One parameter of a group, and how its weights are divided among the group's units.

  Attributes:
    path: path of the parameter.
    axis: the axis along which the units are laid out, counted from the end: -1 or -2. `None` means that
      the whole parameter belongs to one unit.
    unit: index of that one unit; ignored unless `axis` is `None`.
  """

  path: str
  axis: int | None
  unit: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
  """Units that are kept or dropped as a whole.

  Attributes:
    kind: 'neuron', 'head' or 'layer'.
    path: path of the module that declares the group.
    units: number of units.
    members: the parameters that the units consist of. Each index of their leading axes (experts) has
      units of its own.
    dynamic: whether a method selects among the units in every forward pass. Decoding may then read only
      the selected units. No unit can be removed, because the number of units affects the selection.
  """

  kind: str
  path: str
  units: int
  members: tuple[Member, ...]
  dynamic: bool = False

  @property
  def name(self) -> str:
    """Name of the group, such as 'block_0/mlp/neuron'."""
    return '/'.join(filter(None, (self.path, self.kind)))


def pool(group: Group, leaves: Mapping[str, Array]) -> Array:
  """Returns the mean of the leaves' values over each unit, float32 `[units]`.

  Members of the group that have no leaf are ignored.
  """
  total, weights = jnp.zeros(group.units), jnp.zeros(group.units)
  for member in group.members:
    leaf = leaves.get(member.path)
    if leaf is None:
      continue
    if member.axis is None:
      total = total.at[member.unit].add(jnp.sum(leaf, dtype=jnp.float32))
      weights = weights.at[member.unit].add(leaf.size)
    else:
      rows = _by_unit(member, group.units, leaf)
      total, weights = total + jnp.sum(rows, axis=1, dtype=jnp.float32), weights + rows.shape[1]
  return total / jnp.maximum(weights, 1)


def expand(group: Group, values: Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
  """Copies each unit's value to all of its weights; the inverse of `pool`.

  Args:
    group: the group of units.
    values: one value per unit, `[units]`.
    shapes: shapes of parameters by path.

  Returns:
    One array for each member of the group that `shapes` contains, by path.
  """
  spread = {}
  for member in group.members:
    shape = shapes.get(member.path)
    if shape is None:
      continue
    if member.axis is None:
      spread[member.path] = jnp.broadcast_to(values[member.unit], shape)
    else:
      lead, length = shape[:-2], shape[member.axis]
      repeats = math.prod(lead) * length // group.units
      along = jnp.repeat(values, repeats).reshape(*lead, length)
      spread[member.path] = jnp.broadcast_to(
        jnp.expand_dims(along, -2 if member.axis == -1 else -1), shape
      )
  return spread


def _by_unit(member: Member, units: int, leaf: Array) -> Array:
  """Reshapes a leaf to `[units, weights per unit]`."""
  return jnp.moveaxis(leaf, member.axis, leaf.ndim - 2).reshape(units, -1)
