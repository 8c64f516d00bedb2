"""SparseGPT: one-shot pruning that corrects the remaining weights."""

import dataclasses
from typing import ClassVar

import jax

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.one_shot import OneShot, prune_by_obs
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'SparseGPT'


@dataclasses.dataclass(frozen=True)
class SparseGPT(OneShot):
  """Prunes each matrix of a trained model input by input, and corrects the weights of later inputs.

  The pattern has to be 'unstructured' or N:M, because masks are chosen input by input.

  Differs from the paper: the number of kept weights is exact; the reference drops one weight more.

  Attributes:
    damp: number added to the diagonal of the Gram matrix, divided by the diagonal's mean.
    block: number of inputs whose mask is chosen together.
  """

  damp: float = ranged(0.01, '(0, inf)')
  block: int = ranged(128, '[1, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Frantar and Alistarh 2023 (SparseGPT), algorithm 1',
    saves='dropped weights, after training; pruning needs no gradient',
    needs=('xtx',),
  )

  def check(self) -> None:
    """Raises UserError unless the pattern ranks single weights, all together or in N:M groups."""
    require(
      self.units.inputs_per_group is not None,
      'config.weight.pattern',
      self.pattern,
      'one that ranks single weights, all at once or within N:M groups of inputs',
    )

  def prune(self, params: Tree, signals: dict[str, Tree], target: Tree) -> tuple[Tree, Tree]:
    """Returns new weights and masks; `xtx` is the mean outer product `[in, in]` of a kernel's inputs."""
    groups = self.units if self.units.inputs_per_group > 1 else None
    pairs = jax.tree.map(
      lambda w, gram, density: prune_by_obs(w, gram, density, groups, self.damp, self.block),
      params,
      signals['xtx'],
      target,
    )
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    return tuple(jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in (0, 1))
