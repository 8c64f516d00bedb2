"""The usual residual connection: every token enters every layer."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.tokens import Tokens


class Residual(LayerMethod):
  """`x + block(x)`."""

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Vaswani et al. 2017, with the norm first (Xiong et al. 2020)', saves='nothing'
    )

  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer.

    `block(tokens, mode)` returns what is added to the residual stream, for any subset of the tokens.
    """
    return tokens.x + block(tokens, mode)
