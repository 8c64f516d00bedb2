"""SiLU (swish), the activation of SwiGLU."""

import jax
from flax import linen as nn


class SiLU(nn.Module):
  """`x sigmoid(x)`.

  Paper: Elfwing et al. 2017.
  Saves: nothing.
  """

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.silu(h)
