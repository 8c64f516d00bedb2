"""L0 regularisation: a learned gate for each unit."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.estimator import (
  BETA,
  ESTIMATORS,
  hard_concrete_logit,
  hard_concrete_probability,
  with_gradient_of,
)
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import kept_count, per_matrix
from sparse_lm.kernels.topk import topk_mask
from sparse_lm.weights.method import Array, Sparse, apply_masks, mean_density, restrict_to
from sparse_lm.weights.random_start import path_key
from sparse_lm.weights.traits import Traits
from sparse_lm.weights.unit_scores import UnitScores

DISPLAY_NAME = 'L0'

EVALUATED = 0.8  # factor of the logits in evaluation


@dataclasses.dataclass(frozen=True)
class L0(UnitScores):
  """Multiplies each unit of the pattern by a hard concrete gate whose logit is learned with the weights.

  Training draws the gates at random. Evaluation opens the gates of the largest logits, as many as
  training expects to be open, and gives them fixed values. The penalty counts the gates that evaluation
  opens, with the gradient of the probability that a gate is open. The final sparsity is learned: it
  follows from `price`, or from `config.budget.target`, which fixes the forward FLOPs.

  Differs from the paper: evaluation opens the expected number of gates, with values of
  `sigmoid(0.8 logit / temperature)`, as CoFi does (Xia et al. 2022). The paper opens gates above a
  threshold, and similar logits would cross it all at once. With the patterns N:M and per_output the
  masks are those of 'unstructured', because a fixed number of open gates in each group could not follow
  a budget.

  Attributes:
    open: probability that a gate is open at step 0.
    price: penalty for keeping all prunable weights, in nats per token; not used with a budget.
    learned_rate: learning rate of the logits, as a multiple of the weights' rate.
  """

  open: float = ranged(0.9, '(0, 1)')
  traits: ClassVar[Traits] = Traits(
    paper='Louizos et al. 2018 (Learning Sparse Neural Networks through L0 Regularization)',
    saves='the forward pass of closed units; training computes them all',
    exact_density=False,
    controlled=True,
  )

  @property
  def first_score(self) -> float:
    """The logit at which a gate is open with probability `open`."""
    return hard_concrete_logit(self.open)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns weights times gates; training with a key draws the gates."""
    logits = trainable['learned']
    gates, opened = self._evaluated(logits)
    if mode == 'train' and key is not None:
      gates = {
        name: ESTIMATORS['hard_concrete'].decide(units, path_key(key, name), True).factor
        for name, units in logits.items()
      }
    prunable = restrict_to(trainable['params'], sparse.target)
    priced = {
      name: with_gradient_of(opened[name].astype(jnp.float32), hard_concrete_probability(units))
      for name, units in logits.items()
    }
    seen = _times(trainable['params'], self.units.expand(gates, prunable))
    return seen, self.means(priced, prunable)

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """`price` times the fraction of the prunable weights that is kept."""
    return self.price * mean_density(density, trainable['params'])

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns weights times gates, and the masks of the open gates."""
    gates, opened = self._evaluated(trainable['learned'])
    prunable = restrict_to(trainable['params'], sparse.target)
    masks = self.units.expand(opened, prunable)
    return apply_masks(
      _times(trainable['params'], self.units.expand(gates, prunable)), masks
    ), masks

  def _evaluated(self, logits: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the values of the gates in evaluation, and which gates are open (bool)."""
    opened = {name: per_matrix(_likeliest, units) for name, units in logits.items()}
    gates = {
      name: opened[name] * jax.nn.sigmoid(EVALUATED * units / BETA)
      for name, units in logits.items()
    }
    return gates, opened


def _likeliest(logits: Array) -> Array:
  """Marks the largest logits of a matrix, as many as training expects to be open (bool)."""
  count = kept_count(logits.size, jnp.mean(hard_concrete_probability(logits)))
  return topk_mask(jax.lax.stop_gradient(logits), count)


def _times(params: Tree, gates: Tree) -> Tree:
  return jax.tree.map(lambda w, gate: w if gate is None else w * gate, params, gates)
