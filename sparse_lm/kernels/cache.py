"""How keys and values are laid out while a sequence is decoded, so that one query reads them in place."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

Array = jax.Array
LANES = 16
# Tokens of a call that are written one by one; a prompt's are more.
FEW = 16


def slots_for(size: int) -> int:
  """Slots to allocate for `size` tokens: one that nobody reads, for what is not to be written, and whole
  vectors of them."""
  return -(-(size + 1) // LANES) * LANES


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which axis of the cached keys or values, `[B * G, ...]`, is that of the tokens.

  Attributes:
    axis: 2 = tokens in the last axis, as one query reads keys: rows of features. 1 = tokens before the
      features, as it reads values.
  """

  axis: int

  def empty(self, new_BxLxGxK: Array, slots: int) -> Array:
    """Zeros with room for `slots` tokens like these."""
    b, _, g, width = new_BxLxGxK.shape
    shape = (b * g, width, slots) if self.axis == 2 else (b * g, slots, width)
    return jnp.zeros(shape, new_BxLxGxK.dtype)

  def write(self, cached: Array, new_BxLxGxK: Array, slot_BxL: Array) -> Array:
    """The cached array with new tokens in their slots."""
    b, l, g, width = new_BxLxGxK.shape
    if self.axis == 2:
      new = new_BxLxGxK.transpose(0, 2, 3, 1).reshape(b * g, width, l)
    else:
      new = new_BxLxGxK.transpose(0, 2, 1, 3).reshape(b * g, l, width)
    return write(cached, new, slot_BxL, self.axis)

  def read(self, cached: Array, batch: int) -> Array:
    """The cached array as `[B, S, G, K]`."""
    by_sequence = cached.reshape(batch, -1, *cached.shape[1:])
    return by_sequence.transpose((0, 3, 1, 2) if self.axis == 2 else (0, 2, 1, 3))


KEYS, VALUES = Layout(axis=2), Layout(axis=1)


def all_means(cached_MxKxS: Array, size: int, blocks: int) -> Array:
  """The mean of each block of so many keys that are cached, float32 `[B * G, N, K]`."""
  m, width, _ = cached_MxKxS.shape
  k_MxKxNxS = cached_MxKxS[..., : blocks * size].reshape(m, width, blocks, size)
  return jnp.mean(k_MxKxNxS, axis=-1, dtype=jnp.float32).swapaxes(1, 2)


def one_mean(cached_MxKxS: Array, size: int, block_B: Array) -> Array:
  """The mean of one block of each sequence, float32 `[B * G, 1, K]`: only its keys are read."""
  (m, width, _), b = cached_MxKxS.shape, len(block_B)
  apart = cached_MxKxS.reshape(b, m // b, width, -1)
  each = jax.vmap(
    lambda keys, block: jax.lax.dynamic_slice_in_dim(keys, block * size, size, axis=-1)
  )
  return jnp.mean(each(apart, block_B), axis=-1, dtype=jnp.float32).reshape(m, 1, width)


def write(cached: Array, new: Array, slot_BxL: Array, axis: int) -> Array:
  """Puts tokens, along `axis` of `new`, in their slots; rows of the first axis are shared out evenly.

  A few tokens, or one of each sequence, are written one after another, in place: XLA:CPU runs the
  scatter that would write them at once by copying the whole array.
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
