"""SNIP: prunes before training, by the first-order change of the loss."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'SNIP'


@dataclasses.dataclass(frozen=True)
class SNIP(ScoredMethod):
  """Chooses masks before the first step: keeps the weights whose removal would change the loss most.

  The change is estimated to first order. The weights of all matrices are ranked together, and each matrix
  keeps at least 1 % of its weights. With `shuffle=True` the masks are shuffled within each matrix, which
  is the usual control experiment.
  """

  schedule: str = 'at_start'
  pattern: str = 'global:raw:0.01'
  batches: int = ranged(4, '[1, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Lee et al. 2019 (SNIP), equation 4; shuffled: Frankle et al. 2021 (Pruning Neural Networks at '
    'Initialization), section 5',
    saves='weights, gradients and moments of dropped weights, from the first step',
    needs=('grads',),
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """The magnitude of weight times gradient; the gradient is a mean over `batches` batches."""
    return jax.tree.map(lambda w, g: jnp.abs(w * g), trainable['params'], signals['grads'])
