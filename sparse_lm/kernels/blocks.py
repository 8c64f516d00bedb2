"""Blocks of keys: their means, their scores, and attention of one query to a few of them.

The valid keys of a sequence are divided into blocks in the order of their positions: the first `size`
valid keys are block 0. So all blocks but the last are full even if tokens skip the layer, and blocks
are the same in a cache, where a token that skips the layer has no slot.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels.attention import KeyValues, softmax

Array = jax.Array


def key_ranks(positions_BxL: Array, keys: KeyValues) -> Array:
  """Returns the rank of the last key at or before each position, int32 `[B, L]`; -1 if there is none.

  The rank of a key is the number of valid keys before it.
  """
  if keys.whole:
    return positions_BxL
  before_BxLxS = keys.positions[:, None, :] <= positions_BxL[:, :, None]
  return jnp.sum(before_BxLxS & keys.valid[:, None, :], axis=-1, dtype=jnp.int32) - 1


def means(keys: KeyValues, size: int) -> Array:
  """Returns the mean key of each block, float32 `[B, N, G, K]`; undefined if a block is not full."""
  b, s, g, width = keys.k.shape
  k_BxSxGxK = keys.k
  if not keys.whole:
    last = jnp.iinfo(jnp.int32).max
    order_BxS = jnp.argsort(jnp.where(keys.valid, keys.positions, last), axis=1)
    k_BxSxGxK = jnp.take_along_axis(k_BxSxGxK, order_BxS[..., None, None], axis=1)
  padded = jnp.pad(k_BxSxGxK.astype(jnp.float32), ((0, 0), (0, -s % size), (0, 0), (0, 0)))
  return jnp.mean(padded.reshape(b, -1, size, g, width), axis=2)


def block_scores(q_BxLxHxK: Array, means_BxNxGxK: Array, own_BxL: Array) -> Array:
  """Returns the scores by which queries choose blocks, float32 `[B, G, H / G, L, N]`.

  The score of an earlier block is the product of the query with the block's mean key. The query's own
  block has score infinity, and later blocks have minus infinity.

  Args:
    q_BxLxHxK: queries.
    means_BxNxGxK: mean key of each block.
    own_BxL: int32, the block of each query.
  """
  b, l, _, width = q_BxLxHxK.shape
  q_BxLxGxRxK = q_BxLxHxK.astype(jnp.float32).reshape(b, l, means_BxNxGxK.shape[2], -1, width)
  exact = jax.lax.Precision.HIGHEST
  scores = jnp.einsum('blgrk,bngk->bgrln', q_BxLxGxRxK, means_BxNxGxK, precision=exact)
  own, block = own_BxL[:, None, None, :, None], jnp.arange(means_BxNxGxK.shape[1])
  # Replaces -0.0 by 0.0, because some sorting algorithms order them.
  scores = jnp.where(scores == 0, 0.0, scores)
  return jnp.where(block < own, scores, jnp.where(block == own, jnp.inf, -jnp.inf))


def attend_to_blocks(
  q_Bx1xHxK: Array,
  keys: KeyValues,
  block_BxHxN: Array,
  size: int,
  on_weights: Callable[[Array], Array] | None = None,
) -> Array:
  """Softmax attention of one query per sequence to some blocks, `[B, 1, H, K]`; reads no other block.

  On a CPU, heads run one after the other, because copying all chosen blocks would cost more than reading
  fewer keys saves. On other devices they run at once.

  Args:
    q_Bx1xHxK: queries.
    keys: keys and values of a cache, in which valid keys come first and are in order.
    block_BxHxN: int32, the blocks of each head, without repeats. Blocks after the last key are ignored.
    size: number of keys in a block.
    on_weights: as in `attention`; the weights are `[B, G, H / G, 1, N * size]`.
  """
  b, _, h, width = q_Bx1xHxK.shape
  g, heads = keys.k.shape[2], b * h
  # The layout of a cache, see `kernels/cache.py`.
  k_MxKxS = keys.k.transpose(0, 2, 3, 1).reshape(b * g, width, -1)
  v_MxSxK = keys.v.transpose(0, 2, 1, 3).reshape(b * g, -1, width)
  each = jax.lax.map if jax.default_backend() == 'cpu' else jax.vmap
  start_HxN = block_BxHxN.reshape(heads, -1) * size
  row_H = jnp.repeat(jnp.arange(b * g), h // g)

  def scores_of(head: tuple[Array, Array, Array]) -> Array:
    row, start_N, q_K = head
    block = lambda start: jax.lax.dynamic_slice(k_MxKxS, (row, 0, start), (1, width, size))  # noqa: E731
    return each(lambda start: (q_K[None] @ block(start)[0])[0], start_N)

  def values_of(head: tuple[Array, Array, Array]) -> Array:
    row, start_N, weights_NxS = head
    block = lambda start: jax.lax.dynamic_slice(v_MxSxK, (row, start, 0), (1, size, width))  # noqa: E731
    return jnp.sum(each(lambda a: (a[1][None] @ block(a[0])[0])[0], (start_N, weights_NxS)), axis=0)

  q_HxK = q_Bx1xHxK.reshape(heads, width) * width**-0.5
  scores = each(scores_of, (row_H, start_HxN, q_HxK)).reshape(b, g, h // g, 1, -1)
  place_HxNxS = start_HxN[..., None] + jnp.arange(size)
  there = place_HxNxS.reshape(b, -1) < jnp.sum(keys.valid, axis=1, keepdims=True)
  weights = softmax(scores, there.reshape(scores.shape))
  weights = weights if on_weights is None else on_weights(weights)
  out_HxK = each(values_of, (row_H, start_HxN, weights.reshape(heads, -1, size)))
  return out_HxK.reshape(b, 1, h, width)
