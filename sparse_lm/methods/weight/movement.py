"""Movement pruning: keeps the weights that training moves away from zero."""

import dataclasses
from typing import ClassVar

from sparse_lm.core.errors import require
from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class Movement(ScoredMethod):
  """Keeps the weights of the largest scores, which are learned with the weights, along a cubic ramp.

  The gradient of a score is the gradient of the masked weight times the weight, so a score rises if
  training moves its weight away from zero. Dropped weights get no gradient, but may come back; only
  weight decay and momentum change them. Scores have the learning rate of the weights, because another
  rate would not change their order. The paper fine-tunes trained models: set `config.init_from`.
  """

  traits: ClassVar[Traits] = Traits(
    paper='Sanh et al. 2020 (Movement Pruning), section 3',
    saves='the forward pass of dropped weights; weights, scores and gradients stay dense',
    learns_scores=True,
  )

  def check(self) -> None:
    """Raises UserError if weights would be dropped while all scores are still zero."""
    super().check()
    later = 'a later start, a ramp, or more steps: before the first step all scores are zero'
    require(self.density(0.5, 0) == 1, 'config.weight.start', self.start, later)

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The learned scores."""
    return trainable['learned']
