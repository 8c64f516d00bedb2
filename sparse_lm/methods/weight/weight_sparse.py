"""Weight-sparse transformers: the largest magnitudes alone survive each step."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core import schedule
from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  apply_masks,
  densities,
  full_masks,
  restrict_to,
)
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class WeightSparse(PatternMethod):
  """Zeroes all but the largest magnitudes of each matrix after every optimizer step.

  The mask is chosen anew from the updated weights: gradients and moments are dense and no moment starts
  again, so that a weight that was zeroed comes back once a step makes it large enough. Each matrix's
  density falls linearly from 1 to its target, and the learning rate is scaled by sqrt(final / present
  density) of the sparsest matrices. With the pattern 'floor:4', as in the paper, no neuron and no channel
  of a head keeps fewer than four weights.

  Differs from the paper: counts are rounded to the nearest, where the paper rounds down. Queries, keys
  and values are three matrices, where the paper ranks one of all three.

  Attributes:
    start, end: fractions of the run between which the density falls.
  """

  start: float = ranged(0.01, '[0, 1]')
  end: float = ranged(0.5, '[0, 1]')
  traits: ClassVar[Traits] = Traits(
    paper='Weight-sparse transformers have interpretable circuits (Gao et al. 2025)',
    saves='the forward pass of dropped connections, as far as the ramp has come; gradients and moments '
    'stay dense',
  )

  def check(self) -> None:
    """Raises UserError for a ramp that ends before it starts, or units that could not come back."""
    require(self.start <= self.end, 'config.weight.end', self.end, f'{self.start} or more')
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts from masks that keep every weight."""
    return {'params': params, 'learned': {}}, Sparse(full_masks(params, target), target)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """The weights as they are: zeros among them get their gradient."""
    return trainable['params'], densities(sparse.masks)

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Leaves to `update` which of the updated weights survive."""
    return trainable

  def rate_factor(self, target: Tree, step: Array) -> Array:
    """sqrt(final / present density) of the sparsest matrices."""
    final = jnp.min(jnp.stack(jax.tree.leaves(target)))
    return jnp.sqrt(final / schedule.linear_density(step, *self._span, final))

  def due(self, step: int) -> bool:
    """An update follows every step."""
    return True

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest magnitudes, as many as the ramp allows at `step`."""
    magnitudes = jax.tree.map(jnp.abs, restrict_to(trainable['params'], sparse.target))
    density = jax.tree.map(
      lambda final: schedule.linear_density(step, *self._span, final), sparse.target
    )
    masks = self.units.masks(magnitudes, density)
    params = apply_masks(trainable['params'], masks)
    nothing = jax.tree.map(lambda _: None, params)
    return MaskUpdate(trainable | {'params': params}, sparse.replace(masks=masks), nothing)

  def density(self, target: float, step: int) -> float:
    """The density that the step before `step` left."""
    return float(schedule.linear_density(step - 1, *self._span, target)) if step else 1.0

  def backward_density(self, target: float, step: int) -> float | None:
    """All of the gradient: zeroed weights learn from it."""
    return 1.0

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.span(self.start, self.end, self.total_steps)
