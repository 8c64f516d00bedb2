"""Every query reads the newest keys only."""

from typing import ClassVar

import jax
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.layers.attention import attend, causal, note, share_of_keys
from sparse_lm.layers.spec import Spec


class SlidingWindow(nn.Module):
  """Causal attention to the last `window` positions, the query's own included.

  Paper: Longformer (Beltagy et al. 2020), section 3.1, without dilation or global tokens.
  Saves: scores and values of older keys.

  Attributes:
    window: positions; `query - window < key <= query`.
  """

  spec: Spec
  window: int = ranged(32, '[1, 2^31)')
  twin: ClassVar[str] = 'full'

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
    """Returns `[B, L, H, K]`, see `Full`."""
    keys = k_BxSxGxK.shape[1]
    share = share_of_keys(self.window, q_BxLxHxK.shape[1], keys)
    q_BxLxHxK = note(q_BxLxHxK, self.path, keys, scored=share, read=share)
    mask_BxLxS = causal(positions_BxL, key_positions_BxS, valid_BxS, self.window)
    dropout = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')
    return attend(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxLxS, dropout)
