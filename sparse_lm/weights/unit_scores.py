"""Weight methods that learn a number for each unit, and how sparse the model ends with it."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Units
from sparse_lm.weights.method import Array, PatternMethod, Sparse, restrict_to


@dataclasses.dataclass(frozen=True)
class UnitScores(PatternMethod):
  """Learns a score for each unit of the pattern with the weights, and stores no masks.

  A subclass says what scores do. Its traits say that it is `controlled`.

  Attributes:
    price: nats a token for keeping all prunable weights, without a budget.
    learned_rate: learning rate of the scores over that of the weights.
  """

  price: float = ranged(0.0, '[0, inf)', traced=True)
  learned_rate: float = ranged(10.0, '(0, inf)')

  @property
  def learned_rates(self) -> dict[str, float]:
    """The rate of the scores, which are all that the method learns."""
    return {'': self.learned_rate}

  @property
  def first_score(self) -> float:
    """The score of every unit at step 0."""
    return 0.0

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts from one score for each unit, the same for all, and stores no masks."""
    shapes = jax.eval_shape(self.units.pool, restrict_to(params, target))
    first = self.first_score
    scores = {name: jnp.full(units.shape, first, jnp.float32) for name, units in shapes.items()}
    nothing = jax.tree.map(lambda _: None, params)
    return {'params': params, 'learned': scores}, Sparse(nothing, target)

  def means(self, units: Units, prunable: Tree) -> Tree:
    """The mean over the weights of each prunable leaf of what their units have, float32 scalars."""
    return jax.tree.map(jnp.mean, self.units.expand(units, prunable))
