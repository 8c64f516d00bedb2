"""SET: drops the smallest weights and grows random ones."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core.units import Array, Units
from sparse_lm.weights.rewire import Rewiring
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'SET'


@dataclasses.dataclass(frozen=True)
class SET(Rewiring):
  """Drops a fixed share of the weights, the smallest ones, and grows as many at random.

  All grown weights start at zero, with zeroed moments, also if the same update dropped them.

  Differs from the paper: weights are dropped by magnitude; the paper drops the smallest positive and the
  largest negative weights separately. Updates stop at `end` (0.75 of the run), as in RigL.
  """

  regrown_at_zero: ClassVar[bool] = True
  traits: ClassVar[Traits] = Traits(
    paper='Mocanu et al. 2018 (Nature Communications), algorithm 1',
    saves='weights, gradients and moments of dropped weights, from the first step',
  )

  def growth(self, signals: dict[str, Units], noise: Units) -> Units:
    """Uniform random scores."""
    return noise

  def fraction(self, step: Array) -> Array:
    """Returns `drop_fraction` at every step."""
    return jnp.float32(self.drop_fraction)
