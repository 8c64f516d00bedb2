"""Squared ReLU."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class ReLU2(nn.Module):
  """`max(x, 0)^2`: as good as GELU here at half its cost on a CPU.

  Paper: Primer (So et al. 2021).
  Saves: nothing that is claimed; its zeros are observed.
  """

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return jnp.square(jnp.maximum(h, 0))
