"""Top-k magnitudes in every forward pass, gradients straight through."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core import schedule, tree
from sparse_lm.core.estimator import straight_through
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import (
  Array,
  Sparse,
  WeightMethod,
  apply_masks,
  densities,
  restrict_to,
)


@dataclasses.dataclass(frozen=True)
class STE(WeightMethod):
  """Runs the largest magnitudes of dense weights, chosen anew in every step.

  All weights receive the gradient taken at the masked ones, so training keeps dense weights and a dense
  backward pass; only the result is sparse.

  Paper: jaxpruner's magnitude_ste (Lee et al. 2023); the estimator is Bengio et al. 2013.
  Saves: the forward pass of dropped connections; weights and gradients stay dense.

  Attributes:
    start, end: of a cubic ramp from dense, as fractions of the run; equal at 0 asks for the final
      sparsity from the first step.
    pattern: which sets of weights may be kept.
  """

  start: float = ranged(0.0, '[0, 1]')
  end: float = ranged(0.0, '[0, 1]')
  pattern: str = 'unstructured'
  keeps_dense: ClassVar[bool] = True

  def check(self) -> None:
    """Raises UserError for a ramp that ends before it starts."""
    schedule.check(self.start, self.end)

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """No stored masks."""
    return {'params': params, 'learned': {}}, Sparse(jax.tree.map(lambda w: None, params), target)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """The largest magnitudes; the gradient reaches all weights."""
    params, masks = trainable['params'], self._masks(trainable['params'], sparse, step)
    seen = tree.where_sparse(straight_through, params, masks, dense=lambda w: w)
    return seen, densities(masks)

  def density(self, target: float, step: int) -> float:
    """The ramp."""
    return float(schedule.cubic_density(step, *self._span, target))

  def dense_gradient(self, step: int) -> bool:
    """Always: dropped weights learn too."""
    return True

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """The masks that `effective` chooses at `step`."""
    masks = self._masks(trainable['params'], sparse, step)
    return apply_masks(trainable['params'], masks), masks

  def _masks(self, params: Tree, sparse: Sparse, step: Array) -> Tree:
    prunable = restrict_to(jax.lax.stop_gradient(params), sparse.target)
    target = jax.tree.map(
      lambda final: schedule.cubic_density(step, *self._span, final), sparse.target
    )
    return self.units.masks(jax.tree.map(jnp.abs, prunable), target)

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.span(self.start, self.end, self.total_steps)
