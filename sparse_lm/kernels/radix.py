"""Exact top-k selection in many rows at once, for devices on which each pass is a kernel launch.

Each pass fixes two bits of every row's threshold: one reduction counts how many keys reach each of
three candidates. 32-bit keys are searched by their upper halves first and then, among equal ones, by
their lower halves, so a pass reads 16 bits per key. Fixing more bits per pass would need fewer passes,
but the number of comparisons grows with the number of candidates, and passes would be limited by
arithmetic instead of memory bandwidth. If several keys equal the threshold, the index of the last
selected one is found in the same way. The mask is computed elementwise, so it fuses with the operation
that uses it.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

DIGIT = 2  # bits that a pass over all keys fixes
WIDE_DIGIT = (
  4  # bits that a pass over a part of the keys fixes; such a pass is limited by its launch
)
CHUNK = 2**14  # number of keys that are summed at once


def masks(scores: Sequence[Array], k: Sequence[Array]) -> list[Array]:
  """Implements `kernels.topk.topk_masks`; matrices of one size are searched together.

  Args:
    scores: float arrays `[..., in, out]` or `[N]`.
    k: int32 `[...]` for each array.
  """
  sizes = [math.prod(array.shape[-2:]) for array in scores]
  keys = [ordered_keys(array).reshape(-1, size) for array, size in zip(scores, sizes)]
  ends = _by_length(cutoffs, keys, [count.reshape(-1) for count in k])
  # Each mask is computed from its own scores, so no mask must be sliced out of a larger array.
  found = (selected(key, *end) for key, end in zip(keys, ends))
  return [mask.reshape(array.shape) for mask, array in zip(found, scores)]


def rows(scores: Array, k: Array) -> Array:
  """Implements `kernels.topk.topk_rows`, for all rows at once."""
  keys = ordered_keys(scores).reshape(-1, scores.shape[-1])
  return selected(keys, *cutoffs(keys, jnp.broadcast_to(k, len(keys)))).reshape(scores.shape)


def counts(flags: Sequence[Array]) -> list[Array]:
  """Implements `kernels.topk.counts`; arrays of one size are summed together."""
  lines = [one.reshape(1, -1) for one in flags]
  found = _by_length(lambda line: (jnp.sum(line, axis=-1, dtype=jnp.int32),), lines)
  return [count[0] for (count,) in found]


def _by_length(
  f: Callable, rows: Sequence[Array], *rest: Sequence[Array]
) -> list[tuple[Array, ...]]:
  """Applies `f` to arrays of rows, with one call for all rows of the same length.

  Args:
    f: a function of rows `[R, N]` and other arrays `[R]` that returns arrays `[R]`.
    rows: arrays of rows.
    rest: the other arguments for each array of rows.
  """
  groups: dict[tuple, list[int]] = {}
  for place, array in enumerate(rows):
    groups.setdefault((array.shape[-1], array.dtype), []).append(place)
  found = {}
  for places in groups.values():
    outputs = f(*(jnp.concatenate([arrays[place] for place in places]) for arrays in (rows, *rest)))
    start = 0
    for place in places:
      end = start + len(rows[place])
      found[place] = tuple(output[start:end] for output in outputs)
      start = end
  return [found[place] for place in range(len(rows))]


def ordered_keys(values: Array) -> Array:
  """Returns integer keys with the same order as the floats `values`; -0.0 counts as 0.0.

  The keys of 16-bit floats are int16. Other values are converted to float32, and their keys are int32.
  """
  half = values.dtype.itemsize == 2
  dtype = jnp.int16 if half else jnp.int32
  bits = jax.lax.bitcast_convert_type(values if half else values.astype(jnp.float32), dtype)
  keys = jnp.where(bits < 0, bits ^ jnp.iinfo(dtype).max, bits)
  return jnp.where(keys == -1, 0, keys)


def cutoffs(keys: Array, k: Array) -> tuple[Array, Array]:
  """Returns the k-th largest key of each row, and the index of the last selected key that equals it.

  Args:
    keys: result of `ordered_keys`, `[R, N]`.
    k: int32 `[R]`, in [0, N].

  Returns:
    Thresholds `[R]` with the dtype of `keys`, and int32 indices `[R]`, for `selected`.
  """
  n = keys.shape[-1]
  # The padding comes after all keys and is lower than the key of any number.
  padding = (0, 0), (0, -n % CHUNK if n > CHUNK else 0)
  keys = jnp.pad(keys, padding, constant_values=jnp.iinfo(keys.dtype).min)
  # Every pass reads these keys. Without the barrier, some passes would recompute them from the scores.
  keys = jax.lax.optimization_barrier(keys)
  threshold, above = (_kth_largest if keys.dtype == jnp.int16 else _kth_largest_by_halves)(keys, k)
  if n <= CHUNK:
    last, _ = _reaching(keys == threshold[:, None], k - above, DIGIT)
    return threshold, last
  # Finds first the part of the row that contains the index, then the index. There are about as many parts
  # as keys in a part, and the width of a part divides that of a chunk.
  width = min(CHUNK, 1 << n.bit_length() // 2)
  parts = keys.reshape(len(keys), -1, width)
  (equal,) = _sums(parts == threshold[:, None, None])
  part, left = _reaching(equal, k - above, WIDE_DIGIT)
  found = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
  place, _ = _reaching(found == threshold[:, None], left, WIDE_DIGIT)
  return threshold, part * width + place


def selected(keys: Array, threshold: Array, last: Array) -> Array:
  """Returns a bool mask `[..., N]` of the k largest keys of each row; ties go to the lower index.

  Args:
    keys: `[..., N]`.
    threshold: first result of `cutoffs`, `[...]`.
    last: second result of `cutoffs`, `[...]`.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
  threshold, last = threshold[..., None], last[..., None]
  return (keys > threshold) | ((keys == threshold) & (index <= last))


def halves(keys: Array) -> tuple[Array, Array]:
  """Splits int32 keys into their upper and lower 16 bits, both as int16 with the same order."""
  return (keys >> 16).astype(jnp.int16), ((keys & 0xFFFF) - 2**15).astype(jnp.int16)


def _kth_largest_by_halves(keys: Array, k: Array) -> tuple[Array, Array]:
  """Like `_kth_largest`, for int32 keys."""
  high, low = halves(keys)
  high = jax.lax.optimization_barrier(high)
  level, above = _kth_largest(high, k)
  # Keys with another upper half get the lowest value, which reaches no candidate.
  low = jnp.where(high == level[:, None], low, jnp.iinfo(jnp.int16).min)
  rest, more = _kth_largest(jax.lax.optimization_barrier(low), k - above)
  return (level.astype(jnp.int32) << 16) + (rest.astype(jnp.int32) + 2**15), above + more


def _kth_largest(keys: Array, k: Array) -> tuple[Array, Array]:
  """Returns the largest int16 that at least `k` keys of each row reach, and the number of larger keys."""
  info = jnp.iinfo(keys.dtype)
  parts = keys.reshape(len(keys), -1, min(keys.shape[-1], CHUNK))

  def fix_digit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    base, above = carry
    step = jnp.ones((), keys.dtype) << (info.bits - DIGIT * (i + 1)).astype(keys.dtype)
    # Sums wrap around, as the lowest key is negative.
    candidates = (base + jnp.asarray(digit, keys.dtype) * step for digit in range(1, 2**DIGIT))
    counts = _sums(*(parts >= candidate[:, None, None] for candidate in candidates))
    counts = jnp.sum(jnp.stack(counts, axis=1), axis=-1, dtype=jnp.int32)
    reached = counts >= k[:, None]
    above = jnp.maximum(above, jnp.max(jnp.where(reached, 0, counts), axis=-1))
    return base + jnp.sum(reached, axis=-1, dtype=keys.dtype) * step, above

  lowest = jnp.full(k.shape, info.min, keys.dtype), jnp.zeros(k.shape, jnp.int32)
  return jax.lax.fori_loop(0, info.bits // DIGIT, fix_digit, lowest)


def _reaching(counts: Array, total: Array, bits: int) -> tuple[Array, Array]:
  """Returns the index where each row's running sum reaches `total`, and `total` minus the sum before.

  Args:
    counts: the summands, `[R, N]`.
    total: `[R]`.
    bits: number of bits of the index that a pass fixes.
  """
  digits = -(-(counts.shape[-1] - 1).bit_length() // bits)

  def fix_digit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    entry, before = carry
    index = jax.lax.broadcasted_iota(jnp.int32, counts.shape, counts.ndim - 1)
    step = jnp.int32(1) << bits * (digits - 1 - i)
    candidates = (entry + digit * step for digit in range(1, 2**bits))
    sums = _sums(*(jnp.where(index < end[:, None], counts, 0) for end in candidates))
    sums = jnp.stack(sums, axis=1)
    short = sums < total[:, None]
    before = jnp.maximum(before, jnp.max(jnp.where(short, sums, 0), axis=-1))
    return entry + jnp.sum(short, axis=-1, dtype=jnp.int32) * step, before

  start = jnp.zeros(total.shape, jnp.int32)
  entry, before = jax.lax.fori_loop(0, digits, fix_digit, (start, start))
  return entry, total - before


def _sums(*arrays: Array) -> tuple[Array, ...]:
  """Sums along the last axis, of several arrays of one shape in one reduction; int32."""

  def add(sums: tuple[Array, ...], more: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(sums, more))

  zeros, axis = (jnp.int32(0),) * len(arrays), arrays[0].ndim - 1
  return jax.lax.reduce(tuple(a.astype(jnp.int32) for a in arrays), zeros, add, (axis,))
