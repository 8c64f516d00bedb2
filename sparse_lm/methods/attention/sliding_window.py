"""Every query reads the newest keys only."""

import jax
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers.attention import attend, causal, note, share_of_keys
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens


class SlidingWindow(LayerMethod):
  """Causal attention to the last `window` positions, the query's own included.


  Attributes:
    window: positions; `query - window < key <= query`.
  """

  spec: Spec
  window: int = ranged(32, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Longformer (Beltagy et al. 2020), section 3.1, without dilation or global tokens',
      saves='scores and values of older keys',
      twin='full',
      reach=self.window,
    )

  @nn.compact
  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`, see `Full`."""
    count = keys.k.shape[1]
    share = share_of_keys(self.window, q_BxLxHxK.shape[1], count)
    q_BxLxHxK = note(q_BxLxHxK, self.path, count, scored=share, read=share)
    mask_BxLxS = causal(tokens.positions, keys.positions, keys.valid, self.window)
    dropout = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')
    return attend(q_BxLxHxK, keys.k, keys.v, mask_BxLxS, dropout)
