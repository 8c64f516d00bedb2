"""Wanda: prune by weights and activations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Wanda(ScoredMethod):
  """Keeps the largest `|weight| * norm(input)` of a trained model, without changing what it keeps.

  The paper compares the inputs of each output, which is the default pattern. The signal comes from
  calibration text, so this method prunes trained models and does not train.
  """

  pattern: str = 'per_output'
  traits: ClassVar[Traits] = Traits(
    paper='Sun et al. 2023 (A Simple and Effective Pruning Approach for Large Language Models), '
    'equation 1',
    saves='what it drops, after training; no gradient is needed to prune',
    needs=('x_sq',),
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Magnitudes times the root of `x_sq`, the mean squared inputs `[in]` of each kernel `[in, out]`."""
    return jax.tree.map(
      lambda w, square: jnp.abs(w) * jnp.sqrt(square)[:, None], trainable['params'], signals['x_sq']
    )
