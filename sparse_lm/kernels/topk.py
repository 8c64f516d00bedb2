"""Exact selection: as a mask without sorting, or as indices.

The k-th largest of N values is found by bisection on their bits: a float's bit pattern, read as an
integer, orders like the float, so 32 compare-and-count passes fix the threshold bit by bit. `k` may
be traced, and a pass is one fused reduction where a sort shuffles memory N log N times.

A CPU selects in this way, in one array after the other. Other devices select in all arrays of one size
together and fix two bits in each pass (`kernels/radix.py`); the masks are the same. Which of the two runs
depends on the device that a program is lowered for.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from sparse_lm.kernels import radix

Array = jax.Array


@jax.jit
def counts(flags: Sequence[Array]) -> list[Array]:
  """Number of True in each array, int32."""
  return jax.lax.platform_dependent(tuple(flags), cpu=_counts_one_by_one, default=radix.counts)


def _counts_one_by_one(flags: Sequence[Array]) -> list[Array]:
  return [_count(one) for one in flags]


def _count(flags: Array) -> Array:
  """Number of True in `flags`, int32.

  Columns are summed in float32 first, exact below 2**24 rows: XLA:CPU vectorises that sum and not
  the integer one.
  """
  if flags.ndim < 2:
    return jnp.sum(flags, dtype=jnp.int32)
  return jnp.sum(jnp.sum(flags, axis=0, dtype=jnp.float32).astype(jnp.int32))


def _kth_largest(keys: Array, k: Array) -> Array:
  """The largest int32 `t` for which at least `k` of `keys` are >= `t` (the k-th largest key)."""
  lowest = jnp.where(_count(keys >= 0) >= k, 0, jnp.iinfo(jnp.int32).min).astype(jnp.int32)

  def set_bit(i: Array, threshold: Array) -> Array:
    candidate = threshold + (jnp.int32(1) << (30 - i))
    return jnp.where(_count(keys >= candidate) >= k, candidate, threshold)

  return jax.lax.fori_loop(0, 31, set_bit, lowest)


def top(scores: Array, k: int) -> tuple[Array, Array]:
  """The `k` largest of each row (last axis), in falling order; ties go to the lower index.

  Returns:
    Values `[..., k]` in the dtype of `scores`, with the gradient of a gather, and their int32 indices.
  """
  return jax.lax.top_k(scores, k)


def _first(flags: Array, need: Array) -> Array:
  """The first `need` True entries of `flags` in flat order, by bisection on the flat index."""
  index = jnp.arange(flags.size, dtype=jnp.int32).reshape(flags.shape)
  bits = flags.size.bit_length()

  def set_bit(i: Array, cut: Array) -> Array:
    candidate = cut + (jnp.int32(1) << (bits - 1 - i))
    return jnp.where(_count(flags & (index < candidate)) <= need, candidate, cut)

  return flags & (index < jax.lax.fori_loop(0, bits, set_bit, jnp.int32(0)))


@jax.jit
def topk_mask(scores: Array, k: Array | int) -> Array:
  """Exactly `k` True where `scores` is largest over the whole array; ties go to the lower flat index.

  Args:
    scores: float, any shape, without NaN; taken as float32.
    k: scalar int32 in [0, scores.size], may be traced.

  Returns:
    bool, the shape of `scores`.
  """

  def by_digits(scores: Array, k: Array) -> Array:
    (mask,) = radix.masks((scores.reshape(-1),), (k,))
    return mask.reshape(scores.shape)

  k = jnp.asarray(k, jnp.int32)
  return jax.lax.platform_dependent(scores, k, cpu=_by_bits, default=by_digits)


@jax.jit
def topk_masks(scores: Sequence[Array], k: Sequence[Array | int]) -> list[Array]:
  """`topk_mask` in every trailing matrix of several arrays; a vector counts as a matrix.

  Args:
    scores: each float `[..., in, out]` without NaN; taken as float32.
    k: of each array, int32 that broadcasts to `[...]`, may be traced.

  Returns:
    bool, the shapes of `scores`.
  """
  each = [
    jnp.broadcast_to(jnp.asarray(count, jnp.int32), array.shape[:-2])
    for array, count in zip(scores, k, strict=True)
  ]
  return jax.lax.platform_dependent(
    tuple(scores), tuple(each), cpu=_masks_one_by_one, default=radix.masks
  )


def _masks_one_by_one(scores: Sequence[Array], k: Sequence[Array]) -> list[Array]:
  return [_vmapped(_by_bits, array.ndim - 2)(array, count) for array, count in zip(scores, k)]


def _vmapped(f: Callable, times: int) -> Callable:
  return f if times < 1 else jax.vmap(_vmapped(f, times - 1))


def _by_bits(scores: Array, k: Array) -> Array:
  keys = radix.ordered_keys(scores.astype(jnp.float32))
  threshold = _kth_largest(keys, k)
  at_least = keys >= threshold

  def break_ties() -> Array:
    above = keys > threshold
    return above | _first(keys == threshold, k - _count(above))

  return jax.lax.cond(_count(at_least) == k, lambda: at_least, break_ties)


@jax.jit
def topk_rows(scores: Array, k: Array | int) -> Array:
  """Exactly `k` True in each row (last axis), where it is largest; ties go to the lower index.

  Args:
    scores: float `[..., N]` without NaN, taken as float32; N below 2**20.
    k: scalar int32 in [1, N], may be traced.

  Returns:
    bool `[..., N]`.
  """
  k = jnp.asarray(k, jnp.int32)
  return jax.lax.platform_dependent(scores, k, cpu=_rows_by_bits, default=radix.rows)


def _rows_by_bits(scores: Array, k: Array) -> Array:
  """`topk_rows` by bisecting the 32 bits as two int16 halves, which XLA:CPU counts faster than int32."""
  high, low = radix.halves(radix.ordered_keys(scores.astype(jnp.float32)))
  k = k.astype(jnp.float32)
  threshold = _kth_in_row(high, k)
  above, level = high > threshold, high == threshold
  need = k - _count_in_row(above)
  # Keys of another high half take the lowest value, which no later threshold lets through.
  low = jnp.where(level, low, jnp.iinfo(jnp.int16).min)
  low_threshold = _kth_in_row(low, need)
  at_least = above | (level & (low >= low_threshold))

  def break_ties() -> Array:
    surely = above | (level & (low > low_threshold))
    equal = at_least & ~surely
    first = jnp.cumsum(equal, axis=-1) <= k - _count_in_row(surely)
    return surely | (equal & first)

  exact = jnp.all(_count_in_row(at_least) == k)
  return jax.lax.cond(exact, lambda: at_least, break_ties)


def _count_in_row(flags: Array) -> Array:
  """Number of True in each row, float32 `[..., 1]`; in 32 lanes of int16 where they divide the row."""
  lanes = 32
  if flags.shape[-1] % lanes:
    return jnp.sum(flags, axis=-1, keepdims=True, dtype=jnp.float32)
  parts = flags.reshape(*flags.shape[:-1], -1, lanes)
  counts = jnp.sum(parts, axis=-2, dtype=jnp.int16).astype(jnp.float32)
  return jnp.sum(counts, axis=-1, keepdims=True)


def _kth_in_row(keys: Array, k: Array) -> Array:
  """The k-th largest int16 of each row, `[..., 1]`."""
  lowest = jnp.where(_count_in_row(keys >= 0) >= k, 0, jnp.iinfo(jnp.int16).min).astype(jnp.int16)

  def set_bit(i: Array, threshold: Array) -> Array:
    candidate = threshold + (jnp.int16(1) << (14 - i).astype(jnp.int16))
    return jnp.where(_count_in_row(keys >= candidate) >= k, candidate, threshold)

  return jax.lax.fori_loop(0, 15, set_bit, lowest)


def gaussian_threshold(values: Array, density: float) -> Array:
  """What the largest `density` of each row exceeds if the row is Gaussian (Spark, You et al. 2025).

  `mean + std * quantile(1 - density)` with the population's standard deviation, float32 `[..., 1]`.
  The deviation is good while the mean is no more than some hundred times as large.
  """
  values = values.astype(jnp.float32)
  mean = jnp.mean(values, axis=-1, keepdims=True)
  # From the mean square, in one pass over the row; a row of equal values has a gradient too.
  square = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
  std = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))
  return mean - std * ndtri(density)


def compact(mask: Array, room: int, first: Array | int = 0) -> Array:
  """Where a mask is True: int32 `[room]`, ascending, and beyond the last one any index.

  Counts within rows, then among the rows: no sort, and no scan over the whole mask. Sums are products
  with constants, which XLA:CPU runs as one operation each.

  Args:
    mask: bool `[N]`.
    room: how many to list.
    first: how many to leave out before.
  """
  lanes = 64
  padded = jnp.pad(mask, (0, -mask.size % lanes)).reshape(-1, lanes).astype(jnp.float32)
  upto = padded @ np.triu(np.ones((lanes, lanes), np.float32))  # of its row, itself included
  count = len(upto)
  before = np.tril(np.ones((count, count), np.float32), -1) @ upto[:, -1]
  rank = first + jnp.arange(room, dtype=jnp.float32)
  full = (before + upto[:, -1])[None] <= rank[:, None]  # rows that end before
  row = full.astype(jnp.float32) @ np.ones(count, np.float32)
  row = jnp.minimum(row.astype(jnp.int32), count - 1)
  earlier = upto[row] <= (rank - before[row])[:, None]
  column = earlier.astype(jnp.float32) @ np.ones(lanes, np.float32)
  column = jnp.minimum(column.astype(jnp.int32), lanes - 1)
  return jnp.minimum(row * lanes + column, mask.size - 1)
