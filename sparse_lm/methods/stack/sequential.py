"""One layer after the other."""

from collections.abc import Sequence

import jax

from sparse_lm.layers.method import LayerMethod, Run, Traits
from sparse_lm.layers.tokens import Tokens


class Sequential(LayerMethod):
  """Runs every layer once, each on what the one before it returned.

  A method of this slot may carry anything from layer to layer: which tokens have left, say, or a running
  sum of what the layers returned.
  """

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Vaswani et al. 2017', saves='nothing', splits=True, scans=('train', 'eval')
    )

  def __call__(self, layers: Sequence[Run], tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the last layer; each of `layers` returns its own."""
    x_BxLxD = tokens.x
    for run in layers:
      x_BxLxD = run(tokens.replace(x=x_BxLxD), mode)
    return x_BxLxD
