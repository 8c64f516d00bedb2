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
  """Keeps the weights of largest magnitude.

  By default this is gradual magnitude pruning: the smallest weights are dropped for good, along a cubic
  ramp. With `apply='straight_through'` all weights go on learning. With `start=0` and
  `schedule='at_once'` in addition, the method is jaxpruner's magnitude_ste (Lee et al. 2023); see
  `configs/ste.py`.
  """

  traits: ClassVar[Traits] = Traits(
    paper="To prune, or not to prune (Zhu and Gupta 2017), equation 1; straight-through: jaxpruner's "
    'magnitude_ste (Lee et al. 2023)',
    saves='dropped weights, as far as the ramp has come. Straight-through: only the forward pass of '
    'dropped weights; weights and gradients stay dense',
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The magnitude of each weight."""
    return jax.tree.map(jnp.abs, trainable['params'])
