"""Each layer is kept or dropped, whatever the input."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.layers.gate import LearnedGate
from sparse_lm.layers.method import Traits
from sparse_lm.layers.routed import run_routed
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record

# A logit moves this much faster than other parameters: an optimizer of the Adam family moves each by
# the learning rate at most, and one number has no others to move along with it.
RATE = 10.0


class LayerGate(LearnedGate, kw_only=True):
  """One learned logit for the layer; training draws once for each sequence.

  What evaluation runs moves in steps of a whole layer: a budget between two steps is not met.

  """

  slot: ClassVar[str] = 'depth'

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return self.gate_traits(
      paper='L0 gates on layers as in CoFi (Xia et al. 2022)',
      saves='dropped layers as a whole',
      twin='residual',
      fixed=True,  # packing removes layers that are closed
    )

  @nn.compact
  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer, see `Residual`."""
    start = nn.initializers.constant(self.first_logit / RATE)
    logit = RATE * self.param('logit', start, (), jnp.float32)
    decision = self.decide(jnp.broadcast_to(logit, (tokens.x.shape[0], 1, 1)), mode)
    with record.gated(self.path, self.traits.gating):
      entering = tokens
      if mode != 'train':  # where the gradient of a closed layer's gate needs what the layer gives
        entering = tokens.only(decision.open[..., 0])
      added = run_routed(block, entering, mode)
    return tokens.x + decision.weight.astype(tokens.x.dtype) * added
