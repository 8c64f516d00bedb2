"""Every query of every head reads the keys that score highest with it."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers.attention import attend, causal, note, share_of_keys
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens


class TopKKeys(LayerMethod):
  """Softmax over the `k` largest scores of each query; of equal ones the earlier key's.


  Attributes:
    k: keys that a query reads at most.
  """

  spec: Spec
  k: int = ranged(16, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Gupta et al. 2021 (Memory-efficient Transformers via Top-k Attention)',
      saves='values of the other keys (all scores are computed)',
      twin='full',
    )

  def check(self) -> None:
    """Raises UserError for more keys than the context has."""
    valid = f'1 to config.data.context, {self.spec.context}'
    require(self.k <= self.spec.context, 'config.attention.k', self.k, valid)

  @nn.compact
  def __call__(self, tokens: Tokens, q_BxLxHxK: jax.Array, keys: KeyValues, mode: str) -> jax.Array:
    """Returns `[B, L, H, K]`, see `Full`."""
    count = keys.k.shape[1]
    share = share_of_keys(self.k, q_BxLxHxK.shape[1], count)
    q_BxLxHxK = note(q_BxLxHxK, self.path, count, read=share, most=self.k)
    mask_BxLxS = causal(tokens.positions, keys.positions, keys.valid)
    dropout = nn.Dropout(self.spec.dropout, deterministic=mode != 'train')
    select, most = self._largest, self.k
    return attend(q_BxLxHxK, keys.k, keys.v, mask_BxLxS, dropout, select, most)

  def _largest(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jax.lax.stop_gradient(jnp.where(mask, scores, -jnp.inf))
    return mask & topk_rows(scores, min(self.k, scores.shape[-1]))
