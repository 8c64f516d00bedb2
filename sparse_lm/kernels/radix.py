"""Exact selection in few passes over many rows at once, for processors on which a pass is a launch.

A pass fixes four bits of every row's threshold: it counts in one reduction how many keys reach each of
15 candidates, so that keys of 32 bits take eight passes, and those of 16 bits four. A ninth pass finds
where the last of the keys is that equal the threshold and are selected. Which keys are selected then
follows elementwise, so that a mask fuses with what it is applied to.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

DIGIT = 4  # bits that a pass fixes
CHUNK = 2**14  # keys that are summed at once


def masks(scores: Sequence[Array], k: Sequence[Array]) -> list[Array]:
  """`kernels.topk.topk_masks`; searches the matrices of one size together.

  Args:
    scores: float `[..., in, out]`, or `[N]`.
    k: int32 `[...]` of each.
  """
  sizes = [math.prod(array.shape[-2:]) for array in scores]
  keys = [ordered_keys(array).reshape(-1, size) for array, size in zip(scores, sizes)]
  ends = _by_length(cutoffs, keys, [count.reshape(-1) for count in k])
  # Each mask is made of its own scores, so that none has to be cut out of an array of many.
  found = (selected(key, *end) for key, end in zip(keys, ends))
  return [mask.reshape(array.shape) for mask, array in zip(found, scores)]


def rows(scores: Array, k: Array) -> Array:
  """`kernels.topk.topk_rows`."""
  keys = ordered_keys(scores).reshape(-1, scores.shape[-1])
  return selected(keys, *cutoffs(keys, jnp.broadcast_to(k, len(keys)))).reshape(scores.shape)


def counts(flags: Sequence[Array]) -> list[Array]:
  """`kernels.topk.counts`; sums the arrays of one size together."""
  lines = [one.reshape(1, -1) for one in flags]
  found = _by_length(lambda line: (jnp.sum(line, axis=-1, dtype=jnp.int32),), lines)
  return [count[0] for (count,) in found]


def _by_length(
  f: Callable, rows: Sequence[Array], *rest: Sequence[Array]
) -> list[tuple[Array, ...]]:
  """`f` of every array of rows `[R, N]`, and of others `[R]`: called once for all rows of one length.

  Args:
    f: returns arrays `[R]`.
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
  """Integer keys that order like the floats `values` (-0.0 counts as 0.0).

  They are int16 where values have 16 bits. All others are taken as float32, and their keys are int32.
  """
  half = values.dtype.itemsize == 2
  dtype = jnp.int16 if half else jnp.int32
  bits = jax.lax.bitcast_convert_type(values if half else values.astype(jnp.float32), dtype)
  keys = jnp.where(bits < 0, bits ^ jnp.iinfo(dtype).max, bits)
  return jnp.where(keys == -1, 0, keys)


def cutoffs(keys: Array, k: Array) -> tuple[Array, Array]:
  """The k-th largest key of each row, and the index of the last key equal to it that is selected.

  Args:
    keys: of `ordered_keys`, `[R, N]`.
    k: int32 `[R]`, in [0, N].

  Returns:
    Thresholds `[R]` like `keys`, and indices, int32 `[R]`; see `selected`.
  """
  n = keys.shape[-1]
  width = 1 << n.bit_length() // 2  # about the root of N
  # Behind all others, and lower than the key of any number.
  padding = (0, 0), (0, -n % (width if n <= CHUNK else CHUNK))
  keys = jnp.pad(keys, padding, constant_values=jnp.iinfo(keys.dtype).min)
  # Every pass reads these keys; without the barrier some would compute them again from the scores.
  keys = jax.lax.optimization_barrier(keys)
  threshold = _kth_largest(keys, k)
  parts = keys.reshape(len(keys), -1, width)
  level = threshold[:, None, None]
  above, equal = _sums(parts > level, parts == level)
  part, left = _reaching(equal, k - jnp.sum(above, axis=-1))
  found = jnp.take_along_axis(parts, part[:, None, None], axis=1)[:, 0]
  place, _ = _reaching((found == threshold[:, None]).astype(jnp.int32), left)
  return threshold, part * width + place


def selected(keys: Array, threshold: Array, last: Array) -> Array:
  """bool `[..., N]`: the k largest keys of each row, ties to the lower index.

  Args:
    keys: `[..., N]`.
    threshold, last: of `cutoffs`, `[...]`.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
  threshold, last = threshold[..., None], last[..., None]
  return (keys > threshold) | ((keys == threshold) & (index <= last))


def _kth_largest(keys: Array, k: Array) -> Array:
  """The largest key that at least `k` keys of each row reach."""
  info = jnp.iinfo(keys.dtype)
  parts = keys.reshape(len(keys), -1, min(keys.shape[-1], CHUNK))

  def fix_digit(i: Array, base: Array) -> Array:
    shift = (info.bits - DIGIT * (i + 1)).astype(keys.dtype)
    step = jnp.ones((), keys.dtype) << shift  # sums wrap around, as the lowest key is negative
    digits = (jnp.asarray(digit, keys.dtype) for digit in range(1, 2**DIGIT))
    counts = _sums(*(parts >= (base + digit * step)[:, None, None] for digit in digits))
    reached = jnp.sum(jnp.stack(counts, axis=1), axis=-1) >= k[:, None]
    return base + jnp.sum(reached, axis=-1, dtype=keys.dtype) * step

  lowest = jnp.full(k.shape, info.min, keys.dtype)
  return jax.lax.fori_loop(0, info.bits // DIGIT, fix_digit, lowest)


def _sums(*flags: Array) -> tuple[Array, ...]:
  """How many along the last axis are True, of several arrays of one shape in one reduction; int32."""

  def add(sums: tuple[Array, ...], more: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(sums, more))

  zeros = (jnp.int32(0),) * len(flags)
  return jax.lax.reduce(tuple(f.astype(jnp.int32) for f in flags), zeros, add, (flags[0].ndim - 1,))


def _reaching(counts: Array, total: Array) -> tuple[Array, Array]:
  """The entry at which each row's running sum reaches `total`, and how much of `total` falls to it."""
  index = jnp.arange(counts.shape[-1])
  upto = jnp.sum(jnp.where(index <= index[:, None], counts[:, None], 0), axis=-1)
  short = upto < total[:, None]
  before = jnp.max(jnp.where(short, upto, 0), axis=-1)
  return jnp.sum(short, axis=-1, dtype=jnp.int32), total - before
