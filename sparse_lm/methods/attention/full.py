"""Every query reads every key up to its own position."""

import jax
from flax import linen as nn

from sparse_lm.layers.attention import attend, causal, note
from sparse_lm.layers.spec import Spec


class Full(nn.Module):
  """Causal softmax attention, grouped-query where k has fewer heads.

  A key is read where its position is not above the query's and it is valid: tokens that a layer
  skips keep their places.

  Paper: Vaswani et al. 2017; grouped-query: Ainslie et al. 2023.
  Saves: nothing.
  """

  spec: Spec

  @nn.compact
  def __call__(
    self,
    x_BxLxD: jax.Array,
    q_BxLxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    positions_BxL: jax.Array,
    key_positions_BxS: jax.Array,
    valid_BxS: jax.Array,
    mode: str,
  ) -> jax.Array:
    """Returns `[B, L, H, K]`; `x` (the layer's normalised input) is what gates may decide by."""
    q_BxLxHxK = note(q_BxLxHxK, self.path, k_BxSxGxK.shape[1])
    mask_BxLxS = causal(positions_BxL, key_positions_BxS, valid_BxS)
    dropout = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')
    return attend(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxLxS, dropout)
