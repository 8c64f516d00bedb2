"""Wanda: one-shot pruning by weights and activations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'Wanda'


@dataclasses.dataclass(frozen=True)
class Wanda(ScoredMethod):
  """Keeps the weights of a trained model with the largest `|weight| * norm(input)`, unchanged.

  The paper compares the weights of each output with each other, which is the default pattern. The signal
  comes from calibration text, so the method only prunes trained models.
  """

  pattern: str = 'per_output'
  traits: ClassVar[Traits] = Traits(
    paper='Sun et al. 2023 (A Simple and Effective Pruning Approach for Large Language Models), '
    'equation 1',
    saves='dropped weights, after training; pruning needs no gradient',
    needs=('x_sq',),
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Magnitude times the root of `x_sq`, the mean squared inputs `[in]` of a kernel `[in, out]`."""
    return jax.tree.map(
      lambda w, square: jnp.abs(w) * jnp.sqrt(square)[:, None], trainable['params'], signals['x_sq']
    )
