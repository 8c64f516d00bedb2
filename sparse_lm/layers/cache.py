"""The tokens that a layer has seen, so that decoding need not see them again."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.attention import KeyValues
from sparse_lm.kernels.cache import KEYS, VALUES, Layout, slots_for, write


@dataclasses.dataclass(frozen=True)
class Cache:
  """Where the tokens of one call belong in the `cache` collection of a module, and which are to be read.

  The collection is allocated once. Each sequence of each layer counts its own tokens: what skips a layer
  takes no slot of it. Full, the oldest token's slot is the next one's. One token reads all that is held,
  itself included. Several begin a sequence and read each other: what the slots cannot hold is still read
  by them.

  Attributes:
    module: owns the variables.
    slots: allocated for each sequence.
    slot_BxL: int32, where to write each token of the call.
    valid: bool `[B, S]`, which of the tokens to be read are there.
  """

  module: nn.Module
  slots: int
  slot_BxL: jax.Array
  valid: jax.Array

  @classmethod
  def of(cls, module: nn.Module, size: int, valid_BxL: jax.Array) -> 'Cache':
    """The cache of a module for `size` tokens of each sequence; counts the valid tokens of a call."""
    slots, b = slots_for(size), len(valid_BxL)
    length = module.variable('cache', 'length', jnp.zeros, (b,), jnp.int32)
    index_BxL = length.value[:, None] + jnp.cumsum(valid_BxL, axis=1) - 1
    total_B = length.value + jnp.sum(valid_BxL, axis=1, dtype=jnp.int32)
    stays_BxL = valid_BxL & (index_BxL >= total_B[:, None] - size)
    slot_BxL = jnp.where(stays_BxL, index_BxL % size, size)
    if module.is_initializing():
      return cls(module, slots, slot_BxL, valid_BxL)
    length.value = total_B
    held_BxS = jnp.arange(slots) < jnp.minimum(total_B, size)[:, None]
    return cls(module, slots, slot_BxL, valid_BxL if valid_BxL.shape[1] > 1 else held_BxS)

  @property
  def _reads_new(self) -> bool:
    return self.module.is_initializing() or self.slot_BxL.shape[1] > 1

  def extend(self, name: str, new_BxLxGxK: jax.Array, layout: Layout) -> jax.Array:
    """Writes one kind of what the tokens have; returns what is to be read of it: `[B, S, G, K]`."""
    held = self.module.variable('cache', name, layout.empty, new_BxLxGxK, self.slots)
    if self.module.is_initializing():
      return new_BxLxGxK
    held.value = layout.write(held.value, new_BxLxGxK, self.slot_BxL)
    return new_BxLxGxK if self._reads_new else layout.read(held.value, len(self.slot_BxL))

  def positions(self, new_BxL: jax.Array) -> jax.Array:
    """Writes the positions of the tokens; returns those to be read, int32 `[B, S]`."""
    shape = (len(self.slot_BxL), self.slots)
    held = self.module.variable('cache', 'position', jnp.zeros, shape, jnp.int32)
    if self.module.is_initializing():
      return new_BxL
    held.value = write(held.value, new_BxL, self.slot_BxL, axis=1)
    return new_BxL if self._reads_new else held.value


def extend(module: nn.Module, size: int, new: KeyValues) -> KeyValues:
  """Writes the valid ones of new keys behind those that are held; returns the keys to be read.

  Args:
    module: keeps them in its `cache` collection.
    size: keys that are held of each sequence at most.
  """
  cache = Cache.of(module, size, new.valid)
  k_BxSxGxK = cache.extend('keys', new.k, KEYS)
  v_BxSxGxK = cache.extend('values', new.v, VALUES)
  return KeyValues(k_BxSxGxK, v_BxSxGxK, cache.positions(new.positions), cache.valid)
