"""Softmax attention under any mask, for the methods that differ in the mask alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core import cost


def causal(
  positions_BxL: jax.Array,
  key_positions_BxS: jax.Array,
  valid_BxS: jax.Array,
  window: int | None = None,
) -> jax.Array:
  """bool `[B, L, S]`: valid keys at the query's position or before, at most `window` of them back.

  A query that no such key is left for (a token that skips the layer) reads its own: its output is
  dropped, but the gradient of the gate that dropped it must not come from later tokens.
  """
  age_BxLxS = positions_BxL[:, :, None] - key_positions_BxS[:, None, :]
  reads = (age_BxLxS >= 0) & valid_BxS[:, None, :]
  if window is not None:
    reads &= age_BxLxS < window
  return reads | ((age_BxLxS == 0) & ~jnp.any(reads, axis=-1, keepdims=True))


def note(
  path: tuple[str, ...], q_BxLxHxK: jax.Array, keys: int, scored: float = 1.0, read: float = 1.0
) -> None:
  """Notes both matmuls: every query with every key, times the shares of keys scored and read."""
  flops = 2 * q_BxLxHxK.size * keys
  cost.note(path, 'scores', flops * scored)
  cost.note(path, 'values', flops * read)


def share_of_keys(most: int, length: int) -> float:
  """Keys that causal queries read where each reads `most` at most, over those there are."""
  read = sum(min(t + 1, most) for t in range(length))
  return read / (length * (length + 1) / 2)


def attend(
  q_BxLxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  mask_BxLxS: jax.Array,
  dropout: nn.Dropout,
  select: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Softmax attention, grouped-query where k has fewer heads: `[B, L, H, K]`.

  On a CPU explicit einsums over `[B, H, L, K]` beat `jax.nn.dot_product_attention`, which on a GPU
  dispatches to fused kernels. A query without any key reads all of them alike.

  Args:
    mask_BxLxS: bool, which keys a query may read.
    dropout: of the attention weights.
    select: `(scores, mask) -> mask`, both `[B, G, H / G, L, S]`: narrows the mask by the scores.
  """
  dropped = dropout.rate > 0 and not dropout.deterministic
  if jax.default_backend() == 'gpu' and not dropped and select is None:
    return jax.nn.dot_product_attention(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask_BxLxS[:, None])
  b, l, h, width = q_BxLxHxK.shape
  g = k_BxSxGxK.shape[2]
  q_BxGxRxLxK = q_BxLxHxK.reshape(b, l, g, h // g, width).transpose(0, 2, 3, 1, 4) * width**-0.5
  k_BxGxSxK, v_BxGxSxK = (a.transpose(0, 2, 1, 3) for a in (k_BxSxGxK, v_BxSxGxK))
  scores = jnp.einsum('bgrlk,bgsk->bgrls', q_BxGxRxLxK, k_BxGxSxK).astype(jnp.float32)
  mask = mask_BxLxS[:, None, None]
  if select is not None:
    mask = select(scores, mask)
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = dropout(nn.softmax(scores).astype(q_BxLxHxK.dtype))
  out_BxGxRxLxK = jnp.einsum('bgrls,bgsk->bgrlk', weights, v_BxGxSxK)
  return out_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(b, l, h, width)
