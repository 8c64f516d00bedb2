"""Weight-sparse transformers: all but the largest weights are zeroed after every step."""

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

DISPLAY_NAME = 'weight-sparse'


@dataclasses.dataclass(frozen=True)
class WeightSparse(PatternMethod):
  """Sets all but the largest weights of each matrix to zero after every optimizer step.

  Each step chooses a new mask from the updated weights. Gradients and moments are dense, and moments are
  never reset, so a weight that was zeroed comes back if a step makes it large enough. The density of each
  matrix falls linearly from 1 to its target. The learning rate is multiplied by sqrt(final density /
  current density), for the matrices of lowest final density. With the pattern 'floor:4', as in the
  paper, each neuron and each channel of a head keeps at least four weights.

  Differs from the paper: counts are rounded to the nearest integer; the paper rounds down. Queries, keys
  and values are three matrices; the paper ranks them together as one.

  Attributes:
    start, end: start and end of the ramp, as fractions of the run.
  """

  start: float = ranged(0.01, '[0, 1]')
  end: float = ranged(0.5, '[0, 1]')
  traits: ClassVar[Traits] = Traits(
    paper='Weight-sparse transformers have interpretable circuits (Gao et al. 2025)',
    saves='the forward pass of dropped weights, as far as the ramp has come; gradients and moments stay '
    'dense',
  )

  def check(self) -> None:
    """Raises UserError if the ramp ends before it starts, or if the pattern's units cannot come back."""
    require(self.start <= self.end, 'config.weight.end', self.end, f'{self.start} or more')
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts with masks that keep every weight."""
    return {'params': params, 'learned': {}}, Sparse(full_masks(params, target), target)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the weights as they are, so zeroed weights get a gradient too."""
    return trainable['params'], densities(sparse.masks)

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Changes nothing: `update` zeroes weights after every step."""
    return trainable

  def rate_factor(self, target: Tree, step: Array) -> Array:
    """sqrt(final density / current density), for the matrices of lowest final density."""
    final = jnp.min(jnp.stack(jax.tree.leaves(target)))
    return jnp.sqrt(final / schedule.linear_density(step, *self._span, final))

  def due(self, step: int) -> bool:
    """True for every step."""
    return True

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the weights of largest magnitude, at the density of the ramp at `step`."""
    magnitudes = jax.tree.map(jnp.abs, restrict_to(trainable['params'], sparse.target))
    density = jax.tree.map(
      lambda final: schedule.linear_density(step, *self._span, final), sparse.target
    )
    masks = self.units.masks(magnitudes, density)
    params = apply_masks(trainable['params'], masks)
    nothing = jax.tree.map(lambda _: None, params)
    return MaskUpdate(trainable | {'params': params}, sparse.replace(masks=masks), nothing)

  def density(self, target: float, step: int) -> float:
    """Returns the density at `step`, which the update of the step before has chosen."""
    return float(schedule.linear_density(step - 1, *self._span, target)) if step else 1.0

  def backward_density(self, target: float, step: int) -> float | None:
    """1, because zeroed weights get a gradient."""
    return 1.0

  @property
  def _span(self) -> tuple[int, int]:
    return schedule.span(self.start, self.end, self.total_steps)
