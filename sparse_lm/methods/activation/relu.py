"""ReLU."""

import jax
from flax import linen as nn


class ReLU(nn.Module):
  """`max(x, 0)`."""

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.relu(h)
