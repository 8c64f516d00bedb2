"""A gate for each token and attention head."""

from collections.abc import Callable
from typing import ClassVar

import jax
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers.attention import AttentionLayer, AttentionMethod
from sparse_lm.layers.gate import LearnedGate
from sparse_lm.layers.method import Traits
from sparse_lm.layers.router import Router
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class HeadGate(LearnedGate, AttentionMethod, kw_only=True):
  """Multiplies each head of another attention method by a gate that the token computes.

  The gated method is `config.attention.inner`.

  Differs from the papers: gates may be trained by any estimator, and no head is always open.

  Attributes:
    inner: creates the attention method that is gated.
  """

  inner: Callable[[], AttentionMethod]
  slot: ClassVar[str] = 'attention'

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return self.gate_traits(
      paper='gates on heads as in Voita et al. 2019, per token as in Mixture-of-Heads (Jin et al. 2024)',
      saves='scores, values and output projection of closed heads',
      twin='full',
      skips=False,  # decoding computes closed heads too
    )

  @property
  def layer(self) -> Callable[..., AttentionLayer]:
    """The layer of the gated attention method."""
    return self.inner().layer

  @nn.compact
  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`, with zeros for closed heads; see `MaskedAttention`."""
    heads = q_BxLxHxK.shape[2]
    logits_BxLxH = Router(self.spec, heads, bias=self.first_logit, name='router')(tokens.x)
    decision = self.decide(logits_BxLxH, mode)
    with record.gated(self.path, self.traits.gating):
      out_BxLxHxK = self.inner()(tokens, q_BxLxHxK, keys, mode)
    return out_BxLxHxK * decision.factor[..., None].astype(out_BxLxHxK.dtype)
