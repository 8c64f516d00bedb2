"""Every query reads every key up to its own position."""

import jax
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers.attention import attend, causal, note
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens


class Full(LayerMethod):
  """Causal softmax attention, grouped-query where k has fewer heads.

  A key is read where its position is not above the query's and it is valid: tokens that a layer
  skips keep their places.

  """

  spec: Spec

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='Vaswani et al. 2017; grouped-query: Ainslie et al. 2023', saves='nothing')

  @nn.compact
  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`; `tokens` (the layer's normalised input) is what gates may decide by."""
    q_BxLxHxK = note(q_BxLxHxK, self.path, keys.k.shape[1])
    mask_BxLxS = causal(tokens.positions, keys.positions, keys.valid)
    dropout = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')
    return attend(q_BxLxHxK, keys.k, keys.v, mask_BxLxS, dropout)
