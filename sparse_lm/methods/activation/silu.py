"""SiLU (swish), the activation of SwiGLU."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits

DISPLAY_NAME = 'SiLU'


class SiLU(LayerMethod):
  """SiLU: `x sigmoid(x)`."""

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='Elfwing et al. 2017', saves='nothing')

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Maps `[..., F]` to `[..., F]`."""
    return nn.silu(h)
