"""One layer: attention, then the MLP."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.attention import AttentionMethod
from sparse_lm.layers.draws import Dropout
from sparse_lm.layers.linear import Norm
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


class Block(nn.Module):
  """Pre-norm attention and MLP. With `spec.parallel_residual` both read the layer's input (GPT-NeoX).

  Attributes:
    spec: the model's dimensions.
    attention: constructor of the attention slot's module.
    mlp: constructor of the MLP slot's module.
  """

  spec: Spec
  attention: Callable[..., AttentionMethod]
  mlp: Callable[[], nn.Module]

  @nn.compact
  def __call__(self, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the sum of the outputs of attention and MLP, `[B, L, D]`, without the residual stream."""
    spec, x_BxLxD = self.spec, tokens.x
    tokens = tokens.replace(valid=record.site(self, 'valid', tokens.valid))
    dropout = Dropout(spec.dropout, deterministic=mode != 'train')
    layer = self.attention(parent=None).layer
    attention = layer(spec, self.attention, name='attention')
    a_BxLxD = record.site(self, 'attention/input', Norm(spec, name='norm_1')(x_BxLxD))
    a_BxLxD = attention(tokens.replace(x=a_BxLxD), mode)
    a_BxLxD = record.site(self, 'attention/output', dropout(a_BxLxD))
    r_BxLxD = x_BxLxD if spec.parallel_residual else x_BxLxD + a_BxLxD
    m_BxLxD = record.site(self, 'mlp/input', Norm(spec, name='norm_2')(r_BxLxD))
    m_BxLxD = self.mlp()(m_BxLxD, mode)
    return a_BxLxD + record.site(self, 'mlp/output', dropout(m_BxLxD))
