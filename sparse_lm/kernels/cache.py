"""Memory layout of cached keys and values, from which a single query can read without copies."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

Array = jax.Array
LANES = 16
FEW = 16  # up to this number of tokens per call are written one by one; prompts are longer


def slots_for(size: int) -> int:
  """Returns the number of slots to allocate for `size` tokens.

  It includes one slot that is never read, for tokens that are not kept, and is a multiple of `LANES`.
  """
  return -(-(size + 1) // LANES) * LANES


@dataclasses.dataclass(frozen=True)
class Layout:
  """The layout of cached keys or values, `[B * G, ...]`.

  Attributes:
    axis: the axis of the tokens: 2 for keys, which a query reads as rows of features, and 1 for values.
  """

  axis: int

  def empty(self, new_BxLxGxK: Array, slots: int) -> Array:
    """Returns zeros with `slots` slots for tokens of this shape and dtype."""
    b, _, g, width = new_BxLxGxK.shape
    shape = (b * g, width, slots) if self.axis == 2 else (b * g, slots, width)
    return jnp.zeros(shape, new_BxLxGxK.dtype)

  def write(self, cached: Array, new_BxLxGxK: Array, slot_BxL: Array) -> Array:
    """Returns the cached array with new tokens written to their slots."""
    b, l, g, width = new_BxLxGxK.shape
    if self.axis == 2:
      new = new_BxLxGxK.transpose(0, 2, 3, 1).reshape(b * g, width, l)
    else:
      new = new_BxLxGxK.transpose(0, 2, 1, 3).reshape(b * g, l, width)
    return write(cached, new, slot_BxL, self.axis)

  def read(self, cached: Array, batch: int) -> Array:
    """Returns the cached array as `[B, S, G, K]`."""
    by_sequence = cached.reshape(batch, -1, *cached.shape[1:])
    return by_sequence.transpose((0, 3, 1, 2) if self.axis == 2 else (0, 2, 1, 3))


KEYS, VALUES = Layout(axis=2), Layout(axis=1)


def all_means(cached_MxKxS: Array, size: int, blocks: int) -> Array:
  """Returns the mean of each block of `size` cached keys, float32 `[B * G, N, K]`."""
  m, width, _ = cached_MxKxS.shape
  k_MxKxNxS = cached_MxKxS[..., : blocks * size].reshape(m, width, blocks, size)
  return jnp.mean(k_MxKxNxS, axis=-1, dtype=jnp.float32).swapaxes(1, 2)


def one_mean(cached_MxKxS: Array, size: int, block_B: Array) -> Array:
  """Returns the mean of one block per sequence, float32 `[B * G, 1, K]`; reads only this block."""
  (m, width, _), b = cached_MxKxS.shape, len(block_B)
  apart = cached_MxKxS.reshape(b, m // b, width, -1)
  each = jax.vmap(
    lambda keys, block: jax.lax.dynamic_slice_in_dim(keys, block * size, size, axis=-1)
  )
  return jnp.mean(each(apart, block_B), axis=-1, dtype=jnp.float32).reshape(m, 1, width)


def write(cached: Array, new: Array, slot_BxL: Array, axis: int) -> Array:
  """Writes tokens, which lie along `axis` of `new`, to their slots.

  A few tokens, or one per sequence, are written one by one in place, because XLA:CPU copies the whole
  array for a scatter.

  Args:
    cached: the cached array; its first axis has the same number of rows for each sequence.
    new: the tokens.
    slot_BxL: int32, the slot of each token.
    axis: the axis of the tokens.
  """
  each, tokens = len(cached) // len(slot_BxL), slot_BxL.shape[1]
  if tokens > 1 and slot_BxL.size > FEW:
    slots = jnp.repeat(slot_BxL, each, axis=0)
    put = jax.vmap(lambda row, tokens, at: jnp.moveaxis(row, axis - 1, 0).at[at].set(tokens))
    return jnp.moveaxis(put(cached, jnp.moveaxis(new, axis, 1), slots), 1, axis)
  for sequence, token in itertools.product(range(len(slot_BxL)), range(tokens)):
    start = [0] * cached.ndim
    start[0], start[axis] = sequence * each, slot_BxL[sequence, token]
    rows = new[sequence * each : (sequence + 1) * each]
    row = jax.lax.slice_in_dim(rows, token, token + 1, axis=axis)
    cached = jax.lax.dynamic_update_slice(cached, row, start)
  return cached
