"""Every query reads every key up to its own position."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core import cost
from sparse_lm.layers.spec import Spec


class Full(nn.Module):
  """Causal softmax attention (Vaswani et al. 2017), grouped-query where k has fewer heads.

  A key is read where its position is not above the query's and it is valid: tokens that a layer
  skips keep their places. On a CPU explicit einsums over `[B, H, L, K]` beat
  `jax.nn.dot_product_attention`, which on a GPU dispatches to fused kernels.
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
    flops = 2 * q_BxLxHxK.size * k_BxSxGxK.shape[1]
    cost.note(self.path, 'scores', flops)
    cost.note(self.path, 'values', flops)
    mask_BxLxS = key_positions_BxS[:, None, :] <= positions_BxL[:, :, None]
    mask_Bx1xLxS = (mask_BxLxS & valid_BxS[:, None, :])[:, None]
    dropped = self.spec.dropout > 0 and mode == 'train'
    if jax.default_backend() == 'gpu' and not dropped:
      return jax.nn.dot_product_attention(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask_Bx1xLxS)
    return self._einsum(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask_Bx1xLxS, mode)

  def _einsum(self, q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask_Bx1xLxS, mode: str) -> jax.Array:
    b, l, h, width = q_BxLxHxK.shape
    g = k_BxSxGxK.shape[2]
    q_BxGxRxLxK = q_BxLxHxK.reshape(b, l, g, h // g, width).transpose(0, 2, 3, 1, 4) * width**-0.5
    k_BxGxSxK, v_BxGxSxK = (a.transpose(0, 2, 1, 3) for a in (k_BxSxGxK, v_BxSxGxK))
    scores = jnp.einsum('bgrlk,bgsk->bgrls', q_BxGxRxLxK, k_BxGxSxK).astype(jnp.float32)
    scores = jnp.where(mask_Bx1xLxS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = nn.softmax(scores).astype(q_BxLxHxK.dtype)
    weights = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')(weights)
    out_BxGxRxLxK = jnp.einsum('bgrls,bgsk->bgrlk', weights, v_BxGxSxK)
    return out_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(b, l, h, width)
