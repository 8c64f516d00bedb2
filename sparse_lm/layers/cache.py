"""The keys and values of the tokens that a layer has seen, so that decoding need not see them again."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues

LANES = 16


def extend(module: nn.Module, size: int, new: KeyValues) -> KeyValues:
  """Writes the valid ones of new keys behind those that are held; returns what is to be read.

  The `cache` collection is allocated once, with `size` slots. Each sequence of each layer counts its
  own tokens: what skips a layer takes no slot of it. Full, the oldest token's slot is the next one's.
  One token reads all that is held, itself included. Several begin a sequence and read each other:
  what `size` slots cannot hold is still read by them.
  """
  k_BxLxGxK, v_BxLxGxK, valid_BxL = new.k, new.v, new.valid
  b, l, g, width = k_BxLxGxK.shape
  # Room for what is not written: one slot that nobody reads, and whole vectors of them.
  slots = -(-(size + 1) // LANES) * LANES
  # As one query reads them: keys in rows of features, values in rows of tokens.
  key = module.variable('cache', 'keys', jnp.zeros, (b * g, width, slots), k_BxLxGxK.dtype)
  value = module.variable('cache', 'values', jnp.zeros, (b * g, slots, width), v_BxLxGxK.dtype)
  position = module.variable('cache', 'position', jnp.zeros, (b, slots), jnp.int32)
  length = module.variable('cache', 'length', jnp.zeros, (b,), jnp.int32)
  if module.is_initializing():
    return new
  index_BxL = length.value[:, None] + jnp.cumsum(valid_BxL, axis=1) - 1
  length.value = length.value + jnp.sum(valid_BxL, axis=1, dtype=jnp.int32)
  stays_BxL = valid_BxL & (index_BxL >= length.value[:, None] - size)
  slot_BxL = jnp.where(stays_BxL, index_BxL % size, size)
  k_NxKxL = k_BxLxGxK.transpose(0, 2, 3, 1).reshape(b * g, width, l)
  v_NxLxK = v_BxLxGxK.transpose(0, 2, 1, 3).reshape(b * g, l, width)
  key.value = _write(key.value, k_NxKxL, slot_BxL, axis=2)
  value.value = _write(value.value, v_NxLxK, slot_BxL, axis=1)
  position.value = _write(position.value, new.positions, slot_BxL, axis=1)
  if l > 1:
    return new
  held_BxS = jnp.arange(slots) < jnp.minimum(length.value, size)[:, None]
  k_BxSxGxK = key.value.reshape(b, g, width, slots).transpose(0, 3, 1, 2)
  v_BxSxGxK = value.value.reshape(b, g, slots, width).transpose(0, 2, 1, 3)
  return KeyValues(k_BxSxGxK, v_BxSxGxK, position.value, held_BxS)


def _write(held: jax.Array, new: jax.Array, slot_BxL: jax.Array, axis: int) -> jax.Array:
  """Puts tokens, along `axis` of `new`, in their slots; rows of the first axis are shared out evenly.

  A token of each sequence is written one sequence after another, in place: XLA:CPU runs the scatter
  that would write them at once by copying all that is held.
  """
  each = len(held) // len(slot_BxL)
  if slot_BxL.shape[1] > 1:
    slots = jnp.repeat(slot_BxL, each, axis=0)
    put = jax.vmap(lambda row, tokens, at: jnp.moveaxis(row, axis - 1, 0).at[at].set(tokens))
    tokens = jnp.moveaxis(new, axis, 1)
    return jnp.moveaxis(put(held, tokens, slots), 1, axis)
  for sequence in range(len(slot_BxL)):
    start = [0] * held.ndim
    start[0], start[axis] = sequence * each, slot_BxL[sequence, 0]
    rows = new[sequence * each : (sequence + 1) * each]
    held = jax.lax.dynamic_update_slice(held, rows, start)
  return held
