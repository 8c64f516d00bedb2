"""SparseGPT: prune and make up for it, input by input."""

import dataclasses
from typing import ClassVar

import jax

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.one_shot import OneShot, prune_by_obs
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class SparseGPT(OneShot):
  """Prunes a trained model's matrices one input at a time; later inputs make up for each loss.

  The patterns that can be decided input by input are 'unstructured' and N:M.

  Differs from the paper: the count is exact, where the reference drops a weight more.

  Attributes:
    damp: added to the Gram matrix' diagonal, over its mean.
    block: inputs whose mask is chosen at once.
  """

  damp: float = ranged(0.01, '(0, inf)')
  block: int = ranged(128, '[1, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Frantar and Alistarh 2023 (SparseGPT), algorithm 1',
    saves='what it drops, after training; no gradient is needed to prune',
    needs=('xtx',),
  )

  def check(self) -> None:
    """Raises UserError for a pattern that cannot be decided input by input."""
    require(
      self.units.lookahead is not None,
      'config.weight.pattern',
      self.pattern,
      'one that ranks single weights, all at once or within N:M groups of inputs',
    )

  def prune(self, params: Tree, signals: dict[str, Tree], target: Tree) -> tuple[Tree, Tree]:
    """New weights and masks; `xtx` holds the mean outer product `[in, in]` of each kernel's inputs."""
    groups = self.units if self.units.lookahead > 1 else None
    pairs = jax.tree.map(
      lambda w, gram, density: prune_by_obs(w, gram, density, groups, self.damp, self.block),
      params,
      signals['xtx'],
      target,
    )
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    return tuple(jax.tree.map(lambda pair, i=i: pair[i], pairs, is_leaf=is_pair) for i in (0, 1))
