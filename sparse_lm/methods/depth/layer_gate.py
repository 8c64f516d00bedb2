"""A learned gate for each layer, which does not depend on the input."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.layers.gate import LearnedGate
from sparse_lm.layers.method import Traits
from sparse_lm.layers.routed import run_routed
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record

# A logit moves this many times faster than other parameters. Optimizers of the Adam family move each
# number by at most the learning rate in a step, which is too slow for a single number that decides about
# a layer.
RATE = 10.0


class LayerGate(LearnedGate, kw_only=True):
  """One learned logit decides whether the layer runs; training draws a decision for each sequence.

  Evaluation runs a whole number of layers, so a budget between two such numbers is not met.
  """

  slot: ClassVar[str] = 'depth'

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return self.gate_traits(
      paper='L0 gates on layers as in CoFi (Xia et al. 2022)',
      saves='dropped layers as a whole',
      twin='residual',
      fixed=True,  # packing removes layers that are closed
    )

  @nn.compact
  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer; see `Residual`."""
    start = nn.initializers.constant(self.first_logit / RATE)
    logit = RATE * self.param('logit', start, (), jnp.float32)
    decision = self.decide(jnp.broadcast_to(logit, (tokens.x.shape[0], 1, 1)), mode)
    with record.gated(self.path, self.traits.gating):
      entering = tokens
      if mode != 'train':  # in training the gradient of a closed gate needs the layer's output
        entering = tokens.only(decision.open[..., 0])
      added = run_routed(block, entering, mode)
    return tokens.x + decision.factor.astype(tokens.x.dtype) * added
