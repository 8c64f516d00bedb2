"""Soft movement pruning: keeps the weights whose learned score is above a threshold."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.estimator import with_gradient_of, with_gradient_to_score
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Units
from sparse_lm.weights.method import Array, Sparse, apply_masks, mean_density, restrict_to
from sparse_lm.weights.traits import Traits
from sparse_lm.weights.unit_scores import UnitScores

DISPLAY_NAME = 'soft movement'


@dataclasses.dataclass(frozen=True)
class MovementSoft(UnitScores):
  """Keeps the units of the pattern whose learned score S has `sigmoid(S)` above a threshold.

  The gradient of a score is the product of the masked weights' gradient and the weights, summed over the
  unit, as if there were no threshold. Dropped weights get no gradient, but may come back; only weight
  decay and momentum change them. All scores start at zero, where every unit is kept. The final sparsity
  is learned: it follows from `price`, or from `config.budget.target`, which fixes the forward FLOPs. The
  paper fine-tunes trained models: set `config.init_from`.

  All scores share one threshold. So with the patterns N:M, per_output and floor any number of a group's
  weights may be kept, as with the pattern 'unstructured'.

  Attributes:
    threshold: threshold of `sigmoid(S)`, below its initial value of 0.5.
    price: penalty in nats per token, times the mean of `sigmoid(S)` over all prunable weights; not used
      with a budget.
    learned_rate: learning rate of the scores, as a multiple of the weights' rate; the default is the
    paper's.
  """

  threshold: float = ranged(0.1, '(0, 0.5)')
  learned_rate: float = ranged(333.0, '(0, inf)')
  traits: ClassVar[Traits] = Traits(
    paper='Sanh et al. 2020 (Movement Pruning), section 4',
    saves='the forward pass of dropped units; training computes them all',
    exact_density=False,
    controlled=True,
  )

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the masked weights, and the fraction of each matrix that is kept.

    The fraction has the gradient of the mean of `sigmoid(S)`.
    """
    params, scores = trainable['params'], trainable['learned']
    prunable, keeps = restrict_to(params, sparse.target), self._keeps(scores)
    seen = tree.where_sparse(
      with_gradient_to_score,
      apply_masks(params, self.units.expand(keeps, prunable)),
      self.units.expand(scores, prunable),
      jax.lax.stop_gradient(prunable),
      dense=lambda w: w,
    )
    share = {
      name: with_gradient_of(keeps[name].astype(jnp.float32), jax.nn.sigmoid(units))
      for name, units in scores.items()
    }
    return seen, self.means(share, prunable)

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """`price` times the mean of `sigmoid(S)` over the prunable weights."""
    prunable = restrict_to(trainable['params'], sparse.target)
    shares = {name: jax.nn.sigmoid(units) for name, units in trainable['learned'].items()}
    return self.price * mean_density(self.means(shares, prunable), prunable)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns the masked weights, and the masks."""
    params = trainable['params']
    masks = self.units.expand(self._keeps(trainable['learned']), restrict_to(params, sparse.target))
    return apply_masks(params, masks), masks

  def _keeps(self, scores: Units) -> Units:
    """True for units above the threshold."""
    return {name: jax.nn.sigmoid(units) > self.threshold for name, units in scores.items()}
