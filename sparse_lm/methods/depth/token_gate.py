"""A learned gate for each token and layer."""

from typing import ClassVar

import jax
from flax import linen as nn

from sparse_lm.layers.gate import LearnedGate, normalised
from sparse_lm.layers.method import Traits
from sparse_lm.layers.routed import run_routed
from sparse_lm.layers.router import Router
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class TokenGate(LearnedGate, kw_only=True):
  """A gate decides for each token whether it enters the layer; keys of a token that skips are not read.

  Differs from the papers: a decision depends only on the token, so the model stays causal.
  """

  slot: ClassVar[str] = 'depth'

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return self.gate_traits(
      paper='SkipNet (Wang et al. 2018) for tokens; as a policy BlockDrop (Wu et al. 2018)',
      saves='the whole layer for tokens that skip it, keys and values included',
      twin='residual',
    )

  @nn.compact
  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer; see `Residual`."""
    router = Router(self.spec, 1, bias=self.first_logit, name='router')
    decision = self.decide(router(normalised(tokens.x)), mode)
    with record.gated(self.path, self.traits.gating):
      added = run_routed(block, tokens.only(decision.open[..., 0]), mode)
    return tokens.x + decision.factor.astype(tokens.x.dtype) * added
