"""The keys and values of the tokens that a layer has seen, so that decoding need not see them again."""

import jax
import jax.numpy as jnp
from flax import linen as nn

Keys = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def extend(
  module: nn.Module,
  size: int,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  positions_BxL: jax.Array,
  valid_BxL: jax.Array,
) -> Keys:
  """Writes valid tokens behind those that are held; returns keys, values, positions and validity.

  The `cache` collection is allocated once, with `size` slots. Each sequence of each layer counts its
  own tokens: what skips a layer takes no slot of it. Full, the oldest token's slot is the next one's.
  One token reads all that is held, itself included. Several begin a sequence and read each other:
  what `size` slots cannot hold is still read by them.
  """
  b, l, g, width = k_BxLxGxK.shape
  # As one query reads them: keys in rows of features, values in rows of tokens.
  key = module.variable('cache', 'keys', jnp.zeros, (b, g, width, size), k_BxLxGxK.dtype)
  value = module.variable('cache', 'values', jnp.zeros, (b, g, size, width), v_BxLxGxK.dtype)
  position = module.variable('cache', 'position', jnp.zeros, (b, size), jnp.int32)
  length = module.variable('cache', 'length', jnp.zeros, (b,), jnp.int32)
  if module.is_initializing():
    return k_BxLxGxK, v_BxLxGxK, positions_BxL, valid_BxL
  index_BxL = length.value[:, None] + jnp.cumsum(valid_BxL, axis=1) - 1
  length.value = length.value + jnp.sum(valid_BxL, axis=1, dtype=jnp.int32)
  stays_BxL = valid_BxL & (index_BxL >= length.value[:, None] - size)
  slot_BxL = jnp.where(stays_BxL, index_BxL % size, size)  # out of range: dropped
  row = jnp.arange(b)[:, None]
  key.value = key.value.at[row, :, :, slot_BxL].set(k_BxLxGxK, mode='drop')
  value.value = value.value.at[row, :, slot_BxL].set(v_BxLxGxK, mode='drop')
  position.value = position.value.at[row, slot_BxL].set(positions_BxL, mode='drop')
  if l > 1:
    return k_BxLxGxK, v_BxLxGxK, positions_BxL, valid_BxL
  held_BxS = jnp.arange(size) < length.value[:, None]
  k_BxSxGxK, v_BxSxGxK = key.value.transpose(0, 3, 1, 2), value.value.transpose(0, 2, 1, 3)
  return k_BxSxGxK, v_BxSxGxK, position.value, held_BxS
