"""Drop and grow: the mask update of SET and RigL, and the base class of such methods."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Pattern, Units
from sparse_lm.kernels.topk import topk_masks
from sparse_lm.weights.checks import DeclaredSignals, non_finite
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  exchange_masks,
  restrict_to,
)
from sparse_lm.weights.random_start import check, path_keys, random_start, uniform


def drop_and_grow(
  masks: Units,
  weights: Units,
  growth: Units,
  fractions: Mapping[str, Array],
  noise: Units,
  units: Pattern,
) -> tuple[Units, Units]:
  """Drops the smallest weights and grows as many others (SET 2018; RigL 2020, section 3).

  All arguments but `units` are dictionaries by name.

  Args:
    masks: bool `[..., in, out]`. The number of kept weights of each matrix does not change.
    weights: the weights of smallest magnitude are dropped.
    growth: scores. Of all weights that are not kept after the drop, those of largest score are grown, so
      a dropped weight may be grown again in the same update.
    fractions: scalars in [0, 1], the share of each matrix's kept weights that is dropped.
    noise: uniform [0, 1) like `masks`; 1e-5 times the noise is added to magnitudes, to break ties.
    units: the pattern.

  Returns:
    The new masks, and masks of the weights that were kept throughout, both bool like `masks`.
  """
  active = {name: _active(mask) for name, mask in masks.items()}
  survive = [
    count - jnp.floor(fractions[name] * count).astype(jnp.int32) for name, count in active.items()
  ]
  ranked = [
    jnp.where(mask, jnp.abs(weights[name]) + 1e-5 * noise[name], -1.0)
    for name, mask in masks.items()
  ]
  keep = dict(zip(masks, topk_masks(ranked, survive)))
  # Weights that were not dropped rank before grown ones; the pattern may not have room for all of them.
  first = {name: jnp.where(keep[name], jnp.inf, growth[name]) for name in masks}
  new = units.largest(first, active)
  return new, {name: keep[name] & new[name] for name in masks}


def _active(mask: Array) -> Array:
  """Counts the kept weights of each matrix, int32; a vector counts as one matrix."""
  return jnp.sum(mask, axis=tuple(range(max(mask.ndim - 2, 0), mask.ndim)), dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Rewiring(PatternMethod):
  """Starts with random masks, and drops and grows weights every `period` steps.

  A subclass defines which weights grow, `growth`. Grown weights start at zero.

  Attributes:
    regrown_at_zero: whether a weight that one update drops and grows again also starts at zero, with
      zeroed moments. Otherwise it keeps its value.
    period: steps between two updates.
    end: fraction of the run after which no update runs.
    drop_fraction: share of the kept weights that the first update drops.
    rescale: how initial weights are rescaled; see `weights/random_start.py`.
  """

  period: int = ranged(100, '[1, 2^31)')
  end: float = ranged(0.75, '[0, 1]')
  drop_fraction: float = ranged(0.3, '[0, 1]')
  rescale: str = 'unit'
  regrown_at_zero: ClassVar[bool] = False

  def check(self) -> None:
    """Raises UserError for an unknown rescaling, or if the pattern's units cannot grow from zero."""
    check(self.rescale)
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Draws random masks of the target densities."""
    return random_start(key, params, target, self.units, self.rescale)

  def due(self, step: int) -> bool:
    """True every `period` steps after step 0 and before `end`."""
    return 0 < step < self._last and step % self.period == 0

  def growth(self, signals: dict[str, Units], noise: Units) -> Units:
    """Returns a score for each unit; the units of largest score grow.

    Args:
      signals: by the name of the signal, its mean magnitude in each unit.
      noise: uniform [0, 1) in the shapes of the units.
    """
    raise NotImplementedError(type(self).__name__)

  def fraction(self, step: Array) -> Array:
    """Returns the share of the kept weights that is dropped at `step`."""
    raise NotImplementedError(type(self).__name__)

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Drops and grows weights of every prunable leaf."""
    params = trainable['params']

    units, magnitudes = self.units, jax.tree.map(jnp.abs, restrict_to(params, sparse.masks))
    alive = units.alive(sparse.masks)
    pooled = units.pool(magnitudes)
    signalled = {
      need: units.pool(jax.tree.map(jnp.abs, restrict_to(signals[need], sparse.masks)))
      for need in self.traits.needs
    }
    # A dense matrix has no weight that could grow.
    fractions = {
      name: jnp.where(mask.all(), 0.0, self.fraction(step)) for name, mask in alive.items()
    }
    keys = jax.vmap(jax.random.split)(path_keys(key, alive))
    noise = uniform(keys[:, 0], alive)
    declared = DeclaredSignals(signalled, f'{type(self).__name__}.growth', self.traits.needs)
    growth = self.growth(declared, uniform(keys[:, 1], alive))
    rewired, survived = drop_and_grow(alive, pooled, growth, fractions, noise, units)
    masks = units.expand(rewired, magnitudes)
    kept = units.expand(survived, magnitudes) if self.regrown_at_zero else None
    change = exchange_masks(trainable, sparse, masks, kept)
    return change.replace(non_finite=non_finite(growth))

  @property
  def _last(self) -> int:
    return round(self.end * self.total_steps)
