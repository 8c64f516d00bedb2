"""No weight sparsity: the dense twin."""

import dataclasses
from typing import ClassVar

import jax

from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import Array, Sparse, WeightMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class NoSparsity(WeightMethod):
  """Keeps every weight."""

  traits: ClassVar[Traits] = Traits(paper='none', saves='nothing', masked=False)

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts without masks and without target densities, whatever sparsity the config has."""
    nothing = jax.tree.map(lambda w: None, params)
    return {'params': params, 'learned': {}}, Sparse(nothing, nothing)
