"""One layer: attention, then the MLP."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers import cache, sow
from sparse_lm.layers.embed import rotate
from sparse_lm.layers.linear import Linear, Norm, fused_projections
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class Attention(nn.Module):
  """Projections around an attention method.

  Attributes:
    inner: makes the attention slot's module.
    cache_size: keys that decoding keeps.
  """

  spec: Spec
  inner: Callable[[], nn.Module]
  cache_size: int

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    spec = self.spec
    b, l, _ = tokens.x.shape

    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projected = fused_projections(
      self, spec, tokens.x, {'query': wide, 'key': narrow, 'value': narrow}
    )
    # Fewer heads where some were removed.
    q_BxLxHxK, k_BxLxGxK, v_BxLxGxK = (y.reshape(b, l, -1, spec.head_dim) for y in projected)
    if spec.positions == 'rotary':
      q_BxLxHxK, k_BxLxGxK = (rotate(a, tokens.positions) for a in (q_BxLxHxK, k_BxLxGxK))
    # Query heads that share a key head are pruned with it.
    axes = {'query/kernel': -1, 'key/kernel': -1, 'value/kernel': -1, 'out/kernel': -2}
    inner = self.inner()
    record.units(self.path, 'head', spec.kv_heads, axes, dynamic=inner.traits.gating is not None)
    keys = KeyValues(k_BxLxGxK, v_BxLxGxK, tokens.positions, tokens.valid)
    if mode == 'decode' and self.is_mutable_collection('cache'):
      keys = cache.extend(self, self.cache_size, keys)
    out_BxLxHxK = inner(tokens, q_BxLxHxK, keys, mode)
    with record.gated(inner.path, inner.traits.gating):
      return Linear(spec, spec.width, role='out', name='out')(out_BxLxHxK.reshape(b, l, -1))


class Block(nn.Module):
  """Pre-norm attention and MLP; returns what they add to the residual stream.

  Attributes:
    attention: makes the attention slot's module.
    mlp: makes the MLP slot's module.
    cache_size: keys that decoding keeps.
  """

  spec: Spec
  attention: Callable[[], nn.Module]
  mlp: Callable[[], nn.Module]
  cache_size: int

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """`[B, L, D]` to the addend `[B, L, D]`."""
    spec, x_BxLxD = self.spec, tokens.x
    sow.entering(self, tokens.valid)
    dropout = nn.Dropout(spec.dropout, deterministic=mode != 'train')
    attention = Attention(spec, self.attention, self.cache_size, name='attention')
    read = tokens.replace(x=Norm(spec, name='norm_1')(x_BxLxD))
    a_BxLxD = dropout(attention(read, mode))
    m_BxLxD = self.mlp()(Norm(spec, name='norm_2')(x_BxLxD + a_BxLxD), mode)
    return a_BxLxD + dropout(m_BxLxD)
