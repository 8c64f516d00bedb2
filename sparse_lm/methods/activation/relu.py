"""ReLU."""

import jax
from flax import linen as nn


class ReLU(nn.Module):
  """`max(x, 0)`.

  Paper: Nair and Hinton 2010.
  Saves: nothing that is claimed; its zeros are observed.
  """

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.relu(h)
