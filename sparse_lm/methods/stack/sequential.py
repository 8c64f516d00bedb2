"""One layer after the other."""

from collections.abc import Sequence

import jax

from sparse_lm.layers.method import LayerMethod, Run, Traits
from sparse_lm.layers.tokens import Tokens


class Sequential(LayerMethod):
  """Runs every layer once, each on the output of the layer before it.

  Other methods of this slot may pass more from layer to layer: for example which tokens have left the
  model early, or a sum of the outputs of all layers.
  """

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Vaswani et al. 2017', saves='nothing', splits=True, scans=('train', 'eval')
    )

  def __call__(self, layers: Sequence[Run], tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the last layer.

    Each element of `layers` is called with tokens and mode, and returns the stream after that layer.
    """
    x_BxLxD = tokens.x
    for run in layers:
      x_BxLxD = run(tokens.replace(x=x_BxLxD), mode)
    return x_BxLxD
