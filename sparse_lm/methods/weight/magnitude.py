"""Gradual magnitude pruning."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core import schedule, tree
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  Sparse,
  WeightMethod,
  exchange_masks,
  restrict_to,
)


@dataclasses.dataclass(frozen=True)
class Magnitude(WeightMethod):
  """Starts dense and drops the smallest weights along a cubic ramp.

  A dropped weight is zero and does not return, because no dense copy is kept: later masks are subsets
  of earlier ones.

  Paper: To prune, or not to prune (Zhu and Gupta 2017), equation 1.
  Saves: what the ramp has dropped; training is dense at first.

  Attributes:
    start, end: of the ramp, as fractions of the run.
    period: steps between two updates.
    pattern: which sets of weights may be kept.
  """

  start: float = ranged(0.25, '[0, 1]')
  end: float = ranged(0.75, '[0, 1]')
  period: int = ranged(100, '[1, 2^31)')
  pattern: str = 'unstructured'
  one_shot: ClassVar[bool] = True

  def check(self) -> None:
    """Raises UserError for a ramp that ends before it starts."""
    schedule.check(self.start, self.end)

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Full masks."""
    masks = tree.where_sparse(
      lambda w, density: jnp.ones(w.shape, bool), params, target, dense=lambda w: None
    )
    return {'params': params, 'learned': {}}, Sparse(masks, target)

  def due(self, step: int) -> bool:
    """Every `period` steps along the ramp, and at its end."""
    return schedule.due(step, *self._span, self.period)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest magnitudes of the living weights, as many as the ramp allows at `step`."""
    magnitudes = jax.tree.map(jnp.abs, restrict_to(trainable['params'], sparse.masks))
    alive, units = self.units.alive(sparse.masks), self.units.pool(magnitudes)
    # Dropped units rank last even among the exact zeros of living ones.
    scores = {name: jnp.where(alive[name], array, -1.0) for name, array in units.items()}
    densities = {
      name: schedule.cubic_density(step, *self._span, final)
      for name, final in self.units.densities(sparse.target, magnitudes).items()
    }
    chosen = self.units.select(scores, densities)
    # The ramp of a run that is continued with more steps is stretched and may lie above the masks.
    subset = {name: chosen[name] & alive[name] for name in chosen}
    return exchange_masks(trainable, sparse, self.units.expand(subset, magnitudes))

  def density(self, target: float, step: int) -> float:
    """The ramp as the updates follow it."""
    first, last = self._span
    if step <= first:
      return 1.0
    updated = last if step > last else first + (step - 1 - first) // self.period * self.period
    return float(schedule.cubic_density(updated, first, last, target))

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.span(self.start, self.end, self.total_steps)
