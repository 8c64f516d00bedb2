"""Exact top-k selection, as a mask (without sorting) or as indices.

The k-th largest of N values is found by bisection on bits. The bit pattern of a float, read as an
integer, has the same order as the float, so 32 compare-and-count passes determine the threshold bit by
bit. `k` may be traced. Each pass is one fused reduction, which is much cheaper than a sort.

On a CPU, arrays are searched one after the other in this way. On other devices, all arrays of one size
are searched together, two bits per pass (`kernels/radix.py`); the masks are the same. The choice
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
  """Returns the number of true entries in each array, int32."""
  return jax.lax.platform_dependent(tuple(flags), cpu=_counts_one_by_one, default=radix.counts)


def _counts_one_by_one(flags: Sequence[Array]) -> list[Array]:
  return [_count(one) for one in flags]


def _count(flags: Array) -> Array:
  """Returns the number of true entries in `flags`, int32.

  Columns are first summed in float32, which is exact below 2**24 rows, because XLA:CPU vectorises this
  sum but not an integer sum.
  """
  if flags.ndim < 2:
    return jnp.sum(flags, dtype=jnp.int32)
  return jnp.sum(jnp.sum(flags, axis=0, dtype=jnp.float32).astype(jnp.int32))


def _kth_largest(keys: Array, k: Array) -> Array:
  """Returns the k-th largest key: the largest int32 `t` such that at least `k` of `keys` are >= `t`."""
  lowest = jnp.where(_count(keys >= 0) >= k, 0, jnp.iinfo(jnp.int32).min).astype(jnp.int32)

  def set_bit(i: Array, threshold: Array) -> Array:
    candidate = threshold + (jnp.int32(1) << (30 - i))
    return jnp.where(_count(keys >= candidate) >= k, candidate, threshold)

  return jax.lax.fori_loop(0, 31, set_bit, lowest)


def top(scores: Array, k: int) -> tuple[Array, Array]:
  """Returns the `k` largest entries of each row (last axis), descending; ties go to the lower index.

  Returns:
    Values `[..., k]` in the dtype of `scores`, which are differentiable, and their int32 indices.
  """
  return jax.lax.top_k(scores, k)


def _first(flags: Array, need: Array) -> Array:
  """Keeps only the first `need` true entries of `flags` in flat order, by bisection on the flat index."""
  index = jnp.arange(flags.size, dtype=jnp.int32).reshape(flags.shape)
  bits = flags.size.bit_length()

  def set_bit(i: Array, cut: Array) -> Array:
    candidate = cut + (jnp.int32(1) << (bits - 1 - i))
    return jnp.where(_count(flags & (index < candidate)) <= need, candidate, cut)

  return flags & (index < jax.lax.fori_loop(0, bits, set_bit, jnp.int32(0)))


@jax.jit
def topk_mask(scores: Array, k: Array | int) -> Array:
  """Returns a bool mask of the `k` largest scores of the whole array; ties go to the lower flat index.

  Args:
    scores: floats of any shape, without NaN; converted to float32.
    k: int32 scalar in [0, scores.size]; may be traced.
  """

  def by_digits(scores: Array, k: Array) -> Array:
    (mask,) = radix.masks((scores.reshape(-1),), (k,))
    return mask.reshape(scores.shape)

  k = jnp.asarray(k, jnp.int32)
  return jax.lax.platform_dependent(scores, k, cpu=_by_bits, default=by_digits)


@jax.jit
def topk_masks(scores: Sequence[Array], k: Sequence[Array | int]) -> list[Array]:
  """Applies `topk_mask` to each matrix (last two axes) of several arrays; a vector counts as a matrix.

  Args:
    scores: float arrays `[..., in, out]` without NaN; converted to float32.
    k: int32 for each array, which broadcasts to `[...]`; may be traced.

  Returns:
    Bool masks with the shapes of `scores`.
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
  """Returns a bool mask of the `k` largest scores of each row (last axis); ties go to the lower index.

  Args:
    scores: floats `[..., N]` without NaN, converted to float32; N is below 2**20.
    k: int32 scalar in [1, N]; may be traced.
  """
  k = jnp.asarray(k, jnp.int32)
  return jax.lax.platform_dependent(scores, k, cpu=_rows_by_bits, default=radix.rows)


def _rows_by_bits(scores: Array, k: Array) -> Array:
  """Computes `topk_rows` by bisection on two int16 halves, which XLA:CPU counts faster than int32."""
  high, low = radix.halves(radix.ordered_keys(scores.astype(jnp.float32)))
  k = k.astype(jnp.float32)
  threshold = _kth_in_row(high, k)
  above, level = high > threshold, high == threshold
  need = k - _count_in_row(above)
  # Keys with another upper half get the lowest value, which is below every later threshold.
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
  """Returns the number of true entries in each row, float32 `[..., 1]`.

  The sum uses 32 lanes of int16 if 32 divides the row's length.
  """
  lanes = 32
  if flags.shape[-1] % lanes:
    return jnp.sum(flags, axis=-1, keepdims=True, dtype=jnp.float32)
  parts = flags.reshape(*flags.shape[:-1], -1, lanes)
  counts = jnp.sum(parts, axis=-2, dtype=jnp.int16).astype(jnp.float32)
  return jnp.sum(counts, axis=-1, keepdims=True)


def _kth_in_row(keys: Array, k: Array) -> Array:
  """Returns the k-th largest int16 of each row, `[..., 1]`."""
  lowest = jnp.where(_count_in_row(keys >= 0) >= k, 0, jnp.iinfo(jnp.int16).min).astype(jnp.int16)

  def set_bit(i: Array, threshold: Array) -> Array:
    candidate = threshold + (jnp.int16(1) << (14 - i).astype(jnp.int16))
    return jnp.where(_count_in_row(keys >= candidate) >= k, candidate, threshold)

  return jax.lax.fori_loop(0, 15, set_bit, lowest)


def gaussian_threshold(values: Array, density: float) -> Array:
  """Returns the threshold that a fraction `density` of a Gaussian row exceeds (Spark, You et al. 2025).

  This is `mean + std * quantile(1 - density)`, float32 `[..., 1]`, with the population's standard
  deviation. It is accurate as long as the mean is below some hundred standard deviations.
  """
  values = values.astype(jnp.float32)
  mean = jnp.mean(values, axis=-1, keepdims=True)
  # Computed from the mean square in one pass; the lower limit gives rows of equal values a gradient.
  square = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
  std = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 1e-12))
  return mean - std * ndtri(density)


def true_indices(mask: Array, room: int, first: Array | int = 0) -> Array:
  """Returns the indices of true entries, int32 `[room]`, ascending; after the last one, any valid index.

  Counts within rows and then over rows, without a sort or a scan over the mask. The sums are products
  with constant matrices, each of which XLA:CPU runs as one operation.

  Args:
    mask: bool `[N]`.
    room: number of indices to return.
    first: number of true entries to skip.
  """
  lanes = 64
  padded = jnp.pad(mask, (0, -mask.size % lanes)).reshape(-1, lanes).astype(jnp.float32)
  upto = padded @ np.triu(np.ones((lanes, lanes), np.float32))  # true entries of the row so far
  count = len(upto)
  before = np.tril(np.ones((count, count), np.float32), -1) @ upto[:, -1]
  rank = first + jnp.arange(room, dtype=jnp.float32)
  full = (before + upto[:, -1])[None] <= rank[:, None]  # rows that end before the wanted entry
  row = full.astype(jnp.float32) @ np.ones(count, np.float32)
  row = jnp.minimum(row.astype(jnp.int32), count - 1)
  earlier = upto[row] <= (rank - before[row])[:, None]
  column = earlier.astype(jnp.float32) @ np.ones(lanes, np.float32)
  column = jnp.minimum(column.astype(jnp.int32), lanes - 1)
  return jnp.minimum(row * lanes + column, mask.size - 1)
