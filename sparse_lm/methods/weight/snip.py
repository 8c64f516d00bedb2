"""SNIP: prune before training, by what the loss says of each connection."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.score import ScoredMethod
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class SNIP(ScoredMethod):
  """Keeps, before the first step, the weights without which the loss would change most, to first order.

  The weights of all matrices are ranked together, and each matrix keeps a hundredth of its own at least.
  With `shuffle` it is its own control.
  """

  schedule: str = 'at_start'
  pattern: str = 'global:raw:0.01'
  batches: int = ranged(4, '[1, 2^31)')
  traits: ClassVar[Traits] = Traits(
    paper='Lee et al. 2019 (SNIP), equation 4; shuffled: Frankle et al. 2021 (Pruning Neural Networks at '
    'Initialization), section 5',
    saves='weights, gradients and moments of dropped connections, from the first step',
    needs=('grads',),
  )

  def scores(self, trainable: Tree, signals: dict[str, Tree]) -> Tree:
    """Magnitudes of weight times gradient; the gradient is the mean over all batches."""
    return jax.tree.map(lambda w, g: jnp.abs(w * g), trainable['params'], signals['grads'])
