"""Magnitude pruning."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Magnitude(ScoredMethod):
  """Keeps the largest magnitudes.

  By default this is gradual pruning: the smallest weights are dropped for good along a cubic ramp. With
  `apply='straight_through'` all weights go on learning: from `start=0` with `schedule='at_once'` that is
  jaxpruner's magnitude_ste (Lee et al. 2023), see `configs/ste.py`.
  """

  traits: ClassVar[Traits] = Traits(
    paper="To prune, or not to prune (Zhu and Gupta 2017), equation 1; straight-through: jaxpruner's "
    'magnitude_ste (Lee et al. 2023)',
    saves='what the ramp has dropped; training is dense at first. Straight-through: the forward pass of '
    'dropped connections; weights and gradients stay dense',
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The score is the magnitude of the weight."""
    return jax.tree.map(jnp.abs, trainable['params'])
