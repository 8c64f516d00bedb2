"""Magnitude pruning."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod


@dataclasses.dataclass(frozen=True)
class Magnitude(ScoredMethod):
  """Keeps the largest magnitudes.

  By default this is gradual pruning: the smallest weights are dropped for good along a cubic ramp. With
  `apply='straight_through'` all weights go on learning; with the ramp `at_once` from `start=0` that is
  jaxpruner's magnitude_ste (Lee et al. 2023), see `configs/ste.py`.

  Paper: To prune, or not to prune (Zhu and Gupta 2017), equation 1.
  Saves: what the ramp has dropped; training is dense at first, and its weight gradient always is where
    dropped weights learn.
  """

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Magnitudes."""
    return jax.tree.map(jnp.abs, trainable['params'])
