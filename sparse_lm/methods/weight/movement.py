"""Movement pruning: keep what training moves away from zero."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.errors import require
from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Movement(ScoredMethod):
  """Keeps the largest of scores that are learned with the weights, along a cubic ramp.

  A score gets the gradient of what the model sees times the weight, so that it rises where training moves
  a weight away from zero. Dropped weights get no gradient and may come back; decay and momentum alone
  move them. No learning rate of the scores would change their order: they have that of the weights. The
  paper fine-tunes trained models: give `config.init_from`.
  """

  traits: ClassVar[Traits] = Traits(
    paper='Sanh et al. 2020 (Movement Pruning), section 3',
    saves='the forward pass of dropped connections; weights, scores and gradients stay dense',
    learns_scores=True,
  )

  def check(self) -> None:
    """Raises UserError for a start at which all scores are zero still."""
    super().check()
    later = 'a later start, a ramp, or more steps: before the first step all scores are zero'
    require(self.density(0.5, 0) == 1, 'config.weight.start', self.start, later)

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The scores as they have been learned."""
    return trainable['learned']
