"""Every token enters every layer."""

import jax
from flax import linen as nn


class Residual(nn.Module):
  """`x + block(x)`.

  Paper: Vaswani et al. 2017, with the norm first (Xiong et al. 2020).
  Saves: nothing.
  """

  def __call__(
    self,
    block: nn.Module,
    x_BxLxD: jax.Array,
    positions_BxL: jax.Array,
    valid_BxL: jax.Array,
    mode: str,
  ) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer.

    `block(x, positions, valid, mode)` returns what is to be added to it, for any subset of tokens.
    """
    return x_BxLxD + block(x_BxLxD, positions_BxL, valid_BxL, mode)
