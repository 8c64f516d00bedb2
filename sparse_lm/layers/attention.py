"""Softmax attention under any mask, for the methods that differ in the mask alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.plan import record

Select = Callable[[jax.Array, jax.Array], jax.Array]


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
  q_BxLxHxK: jax.Array,
  path: tuple[str, ...],
  keys: int,
  scored: float = 1.0,
  read: float = 1.0,
  most: int | None = None,
) -> jax.Array:
  """Returns the queries, marked with the cost of both matmuls of `attend`, by all pairs.

  Every query is charged with every key, those behind it included, because that is what dense attention
  computes before its mask. A method that reads fewer keys is charged with the share that it reads of
  the causal ones, so that a share means the same by both conventions; `cost.causal_pairs` turns the
  notes into exact counts of what is read. What `attend` computes beyond that is marked as uncharged.

  Args:
    keys: S.
    scored: share of the causal keys whose scores are charged; `read`, of those whose values are.
    most: as in `attend`.
  """
  queries, pair = q_BxLxHxK.shape[1], 2 * q_BxLxHxK.size
  gathered = keys if most is None or queries > 1 else min(most, keys)
  causal = sum(_causal_keys(queries, keys)) / (queries * keys)
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'scores', pair * keys * scored, causal=causal)
  q_BxLxHxK = record.matmul(q_BxLxHxK, path, 'values', pair * keys * read, causal=causal)
  computed, charged = keys + gathered, keys * (scored + read)
  return record.uncharged(q_BxLxHxK, 'keys that a query does not read', pair * (computed - charged))


def share_of_keys(most: int, queries: int, keys: int) -> float:
  """Keys that causal queries read where each reads `most` at most, over those there are.

  The queries are the last ones: all of a sequence, or in decoding the newest.
  """
  there = _causal_keys(queries, keys)
  return sum(min(count, most) for count in there) / sum(there)


def _causal_keys(queries: int, keys: int) -> range:
  """How many keys each query may read, its own included."""
  return range(keys - queries + 1, keys + 1)


def attend(
  q_BxLxHxK: jax.Array,
  k_BxSxGxK: jax.Array,
  v_BxSxGxK: jax.Array,
  mask_BxLxS: jax.Array,
  dropout: nn.Dropout,
  select: Select | None = None,
  most: int | None = None,
) -> jax.Array:
  """Softmax attention, grouped-query where k has fewer heads: `[B, L, H, K]`.

  Scores and weights are arrays of `[B, H, L, S]` on every device: no fused kernel is used. On a CPU
  explicit einsums over `[B, H, L, K]` are 1.3 to 2 times faster than `jax.nn.dot_product_attention`,
  whose default implementation, which a GPU runs here, is XLA's unfused one too (its fused one,
  `implementation='cudnn'`, has to be asked for). A query without any key reads all of them alike.

  Args:
    mask_BxLxS: bool, which keys a query may read.
    dropout: of the attention weights.
    select: `(scores, mask) -> mask`, both `[B, G, H / G, L, S]`: narrows the mask by the scores.
    most: keys that `select` leaves at most; a single query reads the values of no others.
  """
  dropped = dropout.rate > 0 and not dropout.deterministic
  if jax.default_backend() == 'gpu' and not dropped and select is None:
    return jax.nn.dot_product_attention(q_BxLxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask_BxLxS[:, None])
  b, l, h, width = q_BxLxHxK.shape
  g = k_BxSxGxK.shape[2]
  q_BxGxRxLxK = q_BxLxHxK.reshape(b, l, g, h // g, width).transpose(0, 2, 3, 1, 4) * width**-0.5
  k_BxGxSxK, v_BxGxSxK = (a.transpose(0, 2, 1, 3) for a in (k_BxSxGxK, v_BxSxGxK))
  mask = mask_BxLxS[:, None, None]
  if l == 1:
    out_BxGxRxLxK = _attend_once(q_BxGxRxLxK, k_BxGxSxK, v_BxGxSxK, mask, dropout, select, most)
  else:
    scores = jnp.einsum('bgrlk,bgsk->bgrls', q_BxGxRxLxK, k_BxGxSxK)
    weights = dropout(_weights(scores, mask, select))
    out_BxGxRxLxK = jnp.einsum('bgrls,bgsk->bgrlk', weights, v_BxGxSxK)
  return out_BxGxRxLxK.transpose(0, 3, 1, 2, 4).reshape(b, l, h, width)


def _weights(scores: jax.Array, mask: jax.Array, select: Select | None) -> jax.Array:
  """Softmax over the keys that `mask`, and then `select`, leave; in float32, given as scores were."""
  exact = scores.astype(jnp.float32)
  mask = mask if select is None else select(exact, mask)
  return nn.softmax(jnp.where(mask, exact, jnp.finfo(jnp.float32).min)).astype(scores.dtype)


def _attend_once(
  q_BxGxRx1xK: jax.Array,
  k_BxGxSxK: jax.Array,
  v_BxGxSxK: jax.Array,
  mask: jax.Array,
  dropout: nn.Dropout,
  select: Select | None,
  most: int | None,
) -> jax.Array:
  """`[B, G, R, 1, K]` of a single query.

  In three dimensions, keys in rows of features: XLA:CPU runs the general form ten times slower. Decoding
  holds keys and values in that layout, so the transposes cost nothing.
  """
  b, g, r, _, width = q_BxGxRx1xK.shape
  q_NxRxK = q_BxGxRx1xK.reshape(b * g, r, width)
  k_NxKxS = k_BxGxSxK.swapaxes(2, 3).reshape(b * g, width, -1)
  v_NxSxK = v_BxGxSxK.reshape(b * g, -1, width)
  scores_NxRxS = jnp.einsum('nrk,nks->nrs', q_NxRxK, k_NxKxS)
  weights = _weights(scores_NxRxS.reshape(b, g, r, 1, -1), mask, select)
  weights_NxRxS = dropout(weights).reshape(b * g, r, -1)
  if most is None or most >= weights_NxRxS.shape[-1]:
    out_NxRxK = jnp.einsum('nrs,nsk->nrk', weights_NxRxS, v_NxSxK)
  else:
    weights_NxRxS, index_NxRxS = jax.lax.top_k(weights_NxRxS, most)
    v_NxRxSxK = jnp.take_along_axis(v_NxSxK[:, None], index_NxRxS[..., None], axis=2)
    out_NxRxK = jnp.einsum('nrs,nrsk->nrk', weights_NxRxS, v_NxRxSxK)
  return out_NxRxK.reshape(q_BxGxRx1xK.shape)
