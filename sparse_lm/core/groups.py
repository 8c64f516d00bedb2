"""Groups: units that span several matrices, as the modules that own the matrices declare them.

A neuron is a column of `up` and a row of `down`; a head is columns of the query, key and value
projections and rows of the output projection. A module declares its groups while it is traced
(`plan/record.py`); patterns, learned masks and the removal of units read what was declared.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Member:
  """One parameter's part in the units of a group.

  Attributes:
    path: of the parameter.
    axis: along which its units follow each other, counted from the end: -1 or -2; `None` = the whole
      parameter belongs to one unit.
    unit: which one that is; not read where there is an axis.
  """

  path: str
  axis: int | None
  unit: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
  """Units that are kept or dropped as a whole.

  Attributes:
    kind: 'neuron', 'head' or 'layer'.
    path: of the module that declares it.
    units: how many there are.
    members: the parameters that they are made of; leading axes (experts) multiply the units.
    dynamic: whether a method selects among them in every forward pass. Then decoding may read the
      selected alone, and none can be removed: how many there are decides which are selected.
  """

  kind: str
  path: str
  units: int
  members: tuple[Member, ...]
  dynamic: bool = False

  @property
  def name(self) -> str:
    """Such as 'block_0/mlp/neuron'."""
    return '/'.join(filter(None, (self.path, self.kind)))


def pool(group: Group, leaves: Mapping[str, Array]) -> Array:
  """Mean of the leaves' values over each unit, float32 `[units]`; members without a leaf are left out."""
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
  """Each unit's value at every weight of it: arrays of `shapes`, for the members among them."""
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
  """`[units, weights of a unit]`."""
  return jnp.moveaxis(leaf, member.axis, leaf.ndim - 2).reshape(units, -1)
