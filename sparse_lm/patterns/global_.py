"""Single weights, ranked over all matrices together."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Array, Pattern, Units, mean_density


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
  """One ranking over all matrices.

  Scores count over the norm of their matrix's, or matrices of large weights would keep everything.
  """

  spelling: ClassVar[str] = 'global'

  @property
  def spans_layers(self) -> bool:
    """The weights of all layers are ranked together."""
    return True

  def pool(self, leaves: Tree) -> Units:
    """All scores in one array."""
    scaled = [
      leaf.ravel() / jnp.maximum(jnp.linalg.norm(leaf.ravel()), 1e-30)
      for leaf in tree.named(leaves).values()
    ]
    return {'all': jnp.concatenate(scaled)}

  def expand(self, units: Units, like: Tree) -> Tree:
    """The part of the array that is each leaf's."""
    parts, start = {}, 0
    for path, leaf in tree.named(like).items():
      parts[path] = units['all'][start : start + leaf.size].reshape(leaf.shape)
      start += leaf.size
    return tree.map_named(lambda path, leaf: parts[path], like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """The mean over all weights."""
    return {'all': mean_density(tree.named(target), tree.named(like))}
