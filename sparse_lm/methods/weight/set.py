"""Sparse evolutionary training."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core.units import Array, Units
from sparse_lm.weights.rewire import Rewiring
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class SET(Rewiring):
  """Drops a fixed share of the smallest connections and grows as many at random.

  All grown connections start at zero with zeroed moments, those that the same update dropped included.

  Differs from the paper: the drop is by magnitude, where the paper drops the weights closest to zero
    of either sign separately; updates stop at `end` (0.75 of the run), as RigL's do.
  """

  regrown_at_zero: ClassVar[bool] = True
  traits: ClassVar[Traits] = Traits(
    paper='Mocanu et al. 2018 (Nature Communications), algorithm 1',
    saves='weights, gradients and moments of dropped connections, from the first step',
  )

  def growth(self, signals: dict[str, Units], noise: Units) -> Units:
    """Uniform random scores."""
    return noise

  def fraction(self, step: Array) -> Array:
    """The share is `drop_fraction` at every step."""
    return jnp.float32(self.drop_fraction)
