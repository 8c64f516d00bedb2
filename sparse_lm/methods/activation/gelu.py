"""GELU."""

import jax
from flax import linen as nn


class GELU(nn.Module):
  """`x Phi(x)`.

  Paper: Hendrycks and Gimpel 2016.
  Saves: nothing.

  Attributes:
    approximate: the tanh form, cheaper on a CPU than the exact erf.
  """

  approximate: bool = False

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.gelu(h, approximate=self.approximate)
