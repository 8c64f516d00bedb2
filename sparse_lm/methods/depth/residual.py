"""Every token enters every layer."""

import jax
from flax import linen as nn

from sparse_lm.layers.tokens import Tokens


class Residual(nn.Module):
  """`x + block(x)`.

  Paper: Vaswani et al. 2017, with the norm first (Xiong et al. 2020).
  Saves: nothing.
  """

  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer.

    `block(tokens, mode)` returns what is to be added to it, for any subset of the tokens.
    """
    return tokens.x + block(tokens, mode)
