"""GELU."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits

DISPLAY_NAME = 'GELU'


class GELU(LayerMethod):
  """GELU: `x Phi(x)`, where Phi is the normal distribution function.

  Attributes:
    approximate: True computes the tanh approximation, which is faster on a CPU than the exact erf.
  """

  approximate: bool = False

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='Hendrycks and Gimpel 2016', saves='nothing')

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Maps `[..., F]` to `[..., F]`."""
    return nn.gelu(h, approximate=self.approximate)
