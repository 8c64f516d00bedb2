"""Drop-and-grow: the step that SET and RigL share, and a base class for methods made of it."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import by_slice
from sparse_lm.kernels.topk import topk_mask
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  exchange_masks,
  restrict_to,
)
from sparse_lm.weights.random_start import check, path_key, random_start


def drop_and_grow(
  mask: Array,
  weights: Array,
  growth: Array,
  fraction: Array,
  noise: Array,
  top: Callable[[Array, Array], Array] = topk_mask,
) -> tuple[Array, Array]:
  """Drops the smallest connections and grows as many elsewhere (SET 2018; RigL 2020, section 3).

  Args:
    mask: bool `[..., in, out]`; the count of each trailing matrix stays what it is.
    weights: their magnitudes rank the drop.
    growth: scores of the positions to grow, among all that are not kept: a connection that is dropped
      may be grown again at once.
    fraction: scalar in [0, 1], the share of a matrix's active connections that is dropped.
    noise: uniform [0, 1) like `mask`; a 1e-5 part of it breaks ties of the drop.
    top: `(scores, count) -> mask`, what a pattern allows to be kept.

  Returns:
    The new mask, and which of its connections were not dropped, both bool like `mask`.
  """

  def matrix(mask: Array, weights: Array, growth: Array, noise: Array) -> tuple[Array, Array]:
    active = jnp.sum(mask, dtype=jnp.int32)
    drops = jnp.floor(fraction * active).astype(jnp.int32)
    keep = topk_mask(jnp.where(mask, jnp.abs(weights) + 1e-5 * noise, -1.0), active - drops)
    # What is kept comes first; where the pattern has no room for all of it, the largest growth does.
    new = top(jnp.where(keep, jnp.inf, growth), active)
    return new, keep & new

  return by_slice(matrix, mask, weights, growth, noise)


@dataclasses.dataclass(frozen=True)
class Rewiring(PatternMethod):
  """Random masks that drop and grow now and then; a subclass says where to grow.

  New connections start at zero.

  Attributes:
    regrown_at_zero: whether a connection that one update drops and grows again starts at zero too, with
      zeroed moments, or keeps its value.
    period: steps between two updates.
    end: no update from this fraction of the run on.
    drop_fraction: share of the active connections that the first update drops.
    rescale: of the initial weights, see `weights/random_start.py`.
  """

  period: int = ranged(100, '[1, 2^31)')
  end: float = ranged(0.75, '[0, 1]')
  drop_fraction: float = ranged(0.3, '[0, 1]')
  rescale: str = 'unit'
  regrown_at_zero: ClassVar[bool] = False

  def check(self) -> None:
    """Raises UserError for an unknown rescaling, or units that could not grow."""
    check(self.rescale)
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Draws random masks of the target densities."""
    return random_start(key, params, target, self.units, self.rescale)

  def due(self, step: int) -> bool:
    """Every `period` steps, neither at step 0 nor from `end` on."""
    return 0 < step < self._last and step % self.period == 0

  def growth(self, shape: tuple[int, ...], signals: dict[str, Array], key: Array) -> Array:
    """Scores of units of that shape; `signals` holds the units' mean magnitudes of each, by name."""
    raise NotImplementedError(type(self).__name__)

  def fraction(self, step: Array) -> Array:
    """Share of the active connections to drop at `step`."""
    raise NotImplementedError(type(self).__name__)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Rewires every leaf."""
    params = trainable['params']

    units, magnitudes = self.units, jax.tree.map(jnp.abs, restrict_to(params, sparse.masks))
    alive = units.alive(sparse.masks)
    pooled = units.pool(magnitudes)
    signalled = {
      need: units.pool(jax.tree.map(jnp.abs, restrict_to(signals[need], sparse.masks)))
      for need in self.traits.needs
    }
    rewired, survived = {}, {}
    for name, mask in alive.items():
      key_drop, key_grow = jax.random.split(path_key(key, name))
      growth = self.growth(
        mask.shape, {need: pool[name] for need, pool in signalled.items()}, key_grow
      )
      noise = jax.random.uniform(key_drop, mask.shape)
      fraction = jnp.where(
        mask.all(), 0.0, self.fraction(step)
      )  # a dense matrix has nowhere to grow
      rewired[name], survived[name] = drop_and_grow(
        mask, pooled[name], growth, fraction, noise, units.top_of(name)
      )
    masks = units.expand(rewired, magnitudes)
    if self.regrown_at_zero:
      return exchange_masks(trainable, sparse, masks, units.expand(survived, magnitudes))
    return exchange_masks(trainable, sparse, masks)

  @property
  def _last(self) -> int:
    return round(self.end * self.total_steps)
