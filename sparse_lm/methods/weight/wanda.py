"""Wanda: prune by weights and activations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import apply_masks
from sparse_lm.weights.one_shot import OneShot


@dataclasses.dataclass(frozen=True)
class Wanda(OneShot):
  """Keeps the largest `|weight| * norm(input)` of a trained model, without changing what it keeps.

  Paper: Sun et al. 2023 (A Simple and Effective Pruning Approach for Large Language Models), equation 1.
  Saves: what it drops, after training; no gradient is needed to prune.

  Attributes:
    pattern: which sets of weights may be kept; the paper compares the inputs of each output.
  """

  pattern: str = 'per_output'
  needs: ClassVar[tuple[str, ...]] = ('x_sq',)

  def check(self) -> None:
    """Raises UserError for units that no single layer has: layers are pruned one by one."""
    valid = 'a pattern whose units are each of one layer, such as per_output or 2:4'
    require(not self.units.spans_layers, 'config.weight.pattern', self.pattern, valid)

  def prune(self, params: Tree, signals: dict[str, Tree], target: Tree) -> tuple[Tree, Tree]:
    """Masks by score; `x_sq` holds the mean squared inputs `[in]` of each kernel."""
    scores = jax.tree.map(
      lambda w, square: jnp.abs(w) * jnp.sqrt(square)[:, None], params, signals['x_sq']
    )
    masks = self.units.masks(scores, target)
    return apply_masks(params, masks), masks
