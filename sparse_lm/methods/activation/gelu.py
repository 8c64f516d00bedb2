"""GELU."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits


class GELU(LayerMethod):
  """Weighs each unit by the normal distribution function: `x Phi(x)`.


  Attributes:
    approximate: the tanh form, cheaper on a CPU than the exact erf.
  """

  approximate: bool = False

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='Hendrycks and Gimpel 2016', saves='nothing')

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.gelu(h, approximate=self.approximate)
