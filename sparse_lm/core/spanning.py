"""The base class of patterns whose units span several matrices: neurons, heads and layers."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sparse_lm.core import groups, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Array, Pattern, Shapes, Units, mean_density, rounded_to_units


@dataclasses.dataclass(frozen=True)
class SpanningUnits(Pattern):
  """Units that span several matrices, as the modules declare them.

  The pattern's `spelling` is the kind of its groups. Parameters outside these groups stay dense.
  """

  groups: tuple[Group, ...]

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'SpanningUnits | None':
    """Returns the pattern over the declared groups of kind `name`. Raises UserError if there are none."""
    if name != cls.spelling:
      return None
    groups_of_kind = tuple(group for group in declared if group.kind == name)
    if not groups_of_kind:
      raise UserError(
        f'config.weight.pattern={name!r}: the model has no units of this kind; valid: another pattern'
      )
    return cls(groups_of_kind)

  @property
  def spans_matrices(self) -> bool:
    """True: a unit has weights in every matrix of its group."""
    return True

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether the parameter belongs to a group."""
    return any(member.path == path for group in self.groups for member in group.members)

  def _present(self, leaves: Mapping[str, Array]) -> dict[str, Group]:
    return {
      group.name: group for group in self.groups if any(m.path in leaves for m in group.members)
    }

  def pool(self, leaves: Tree) -> Units:
    """Returns the mean over all weights of each unit."""
    named = tree.named(leaves)
    return {name: groups.pool(group, named) for name, group in self._present(named).items()}

  def expand(self, units: Units, like: Tree) -> Tree:
    """Copies each unit's value to all of its weights."""
    shapes = {path: leaf.shape for path, leaf in tree.named(like).items()}
    parts: dict[str, Array] = {}
    for name, group in self._present(shapes).items():
      parts |= groups.expand(group, units[name], shapes)
    return tree.map_named(lambda path, leaf: parts[path], like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """Returns the mean target density over the weights of each group."""
    density, leaves = tree.named(target), tree.named(like)
    found = {}
    for name, group in self._present(leaves).items():
      members = {m.path: leaves[m.path] for m in group.members if m.path in leaves}
      found[name] = mean_density({path: density[path] for path in members}, members)
    return found

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds the density of each group to whole units; all of its members get this density."""
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    asked, found = self.densities(density, like), {}
    for name, group in self._present(shapes).items():
      share = rounded_to_units(group.units, float(asked[name]), name)
      found |= {m.path: share for m in group.members if m.path in shapes}
    return found
