"""The base class of weight methods that learn a score for each unit, and with it the sparsity."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Units
from sparse_lm.weights.method import Array, PatternMethod, Sparse, restrict_to


@dataclasses.dataclass(frozen=True)
class UnitScores(PatternMethod):
  """Learns a score for each unit of the pattern together with the weights, and stores no masks.

  A subclass defines how scores mask the weights, and declares `controlled` in its traits.

  Attributes:
    price: penalty for keeping all prunable weights, in nats per token; not used with a budget.
    learned_rate: learning rate of the scores, as a multiple of the weights' rate.
  """

  price: float = ranged(0.0, '[0, inf)', traced=True)
  learned_rate: float = ranged(10.0, '(0, inf)')

  @property
  def learned_rates(self) -> dict[str, float]:
    """The learning rate of the scores."""
    return {'': self.learned_rate}

  @property
  def first_score(self) -> float:
    """The score of all units at step 0."""
    return 0.0

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts with the same score for all units, and stores no masks."""
    shapes = jax.eval_shape(self.units.pool, restrict_to(params, target))
    first = self.first_score
    scores = {name: jnp.full(units.shape, first, jnp.float32) for name, units in shapes.items()}
    nothing = jax.tree.map(lambda _: None, params)
    return {'params': params, 'learned': scores}, Sparse(nothing, target)

  def means(self, units: Units, prunable: Tree) -> Tree:
    """Returns the mean of the units' values over the weights of each prunable leaf, float32 scalars."""
    return jax.tree.map(jnp.mean, self.units.expand(units, prunable))
