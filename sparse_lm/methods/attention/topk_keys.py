"""Attention to the keys with the highest scores."""

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.attention import Select
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers.attention import MaskedAttention
from sparse_lm.layers.method import Traits

DISPLAY_NAME = 'top-k keys'


class TopKKeys(MaskedAttention):
  """Softmax over the `k` largest scores of each query and head; ties go to the earlier key.

  Attributes:
    k: largest number of keys that a query reads.
  """

  k: int = ranged(16, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Gupta et al. 2021 (Memory-efficient Transformers via Top-k Attention)',
      saves='values of the other keys (all scores are computed)',
      twin='full',
    )

  def check(self) -> None:
    """Raises UserError if `k` exceeds the context."""
    valid = f'1 to config.data.context, {self.spec.context}'
    require(self.k <= self.spec.context, 'config.attention.k', self.k, valid)

  @property
  def max_keys(self) -> int:
    """The number of keys whose values a query reads."""
    return self.k

  @property
  def select(self) -> Select:
    """Selects the largest scores among the keys that the mask allows."""
    return self._largest

  def _largest(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
    scores = jax.lax.stop_gradient(jnp.where(mask, scores, -jnp.inf))
    return mask & topk_rows(scores, min(self.k, scores.shape[-1]))
