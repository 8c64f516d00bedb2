"""Static sparse training: random masks that never change."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import Array, PatternMethod, Sparse
from sparse_lm.weights.random_start import check, random_start
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Static(PatternMethod):
  """Draws random masks at step 0 and trains the weights that they keep.

  If `config.init_from` names a pruned or sparsely trained run, the masks of that run are used.

  Attributes:
    rescale: 'none', 'layer' or 'unit', how initial weights are rescaled; see `weights/random_start.py`.
  """

  rescale: str = 'unit'
  traits: ClassVar[Traits] = Traits(
    paper='the static baseline of RigL (Evci et al. 2020), initialised for its smaller fan-in (Gradient '
    'Flow in Sparse Neural Networks, Evci et al. 2022)',
    saves='weights, gradients and moments of dropped weights, from the first step',
    takes_masks=True,
  )

  def check(self) -> None:
    """Raises UserError for an unknown rescaling."""
    check(self.rescale)

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Draws random masks at the target densities."""
    return random_start(key, params, target, self.units, self.rescale)
