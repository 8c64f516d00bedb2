"""The tokens that a layer has seen, so that decoding need not see them again."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.tree import Tree
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.kernels.cache import KEYS, VALUES, Layout, slots_for, write
from sparse_lm.layers.tokens import Tokens

LENGTH, POSITION = 'length', 'position'
NOWHERE = jnp.iinfo(jnp.int32).max  # behind every query, so that no causal one reads it


@dataclasses.dataclass(frozen=True)
class Cache:
  """Where the tokens of one call belong in the `cache` collection of a module, and which are to be read.

  The collection is allocated once, with room for those tokens that the next ones can read, and for
  several of these: as many as the call that allocates it is given. Each sequence of each layer counts its
  own tokens: what skips a layer takes no slot of it. In a full cache the next token replaces the oldest
  one. Tokens that continue a sequence read all cached tokens, themselves included. Tokens that begin a
  sequence read each other, those too for which there is no slot.

  Attributes:
    module: owns the variables.
    slots: allocated for each sequence; the last one is never read.
    slot_BxL: int32, where to write each token of the call.
    positions: int32 `[B, S]`, of the tokens to be read.
    valid: bool `[B, S]`, which of the tokens to be read are there.
    reads_new: whether the tokens to be read are those of the call.
  """

  module: nn.Module
  slots: int
  slot_BxL: jax.Array
  positions: jax.Array
  valid: jax.Array
  reads_new: bool

  @classmethod
  def of(cls, module: nn.Module, size: int, tokens: Tokens) -> 'Cache':
    """The cache of a module whose queries read `size` tokens at most; counts the valid ones of a call.

    Raises ValueError for several tokens that go on and would overwrite what the first of them reads.
    """
    positions_BxL, valid_BxL = tokens.positions, tokens.valid
    b, count = valid_BxL.shape
    length = module.variable('cache', LENGTH, jnp.zeros, (b,), jnp.int32)
    shape = b, slots_for(size + count - 1)
    position = module.variable('cache', POSITION, jnp.zeros, shape, jnp.int32)
    slots = position.value.shape[1]
    room = slots - 1
    index_BxL = length.value[:, None] + jnp.cumsum(valid_BxL, axis=1) - 1
    total_B = length.value + jnp.sum(valid_BxL, axis=1, dtype=jnp.int32)
    stays_BxL = valid_BxL & (index_BxL >= total_B[:, None] - room)
    slot_BxL = jnp.where(stays_BxL, index_BxL % room, room)
    if module.is_initializing():
      return cls(module, slots, slot_BxL, positions_BxL, valid_BxL, True)
    length.value = total_B
    position.value = write(position.value, positions_BxL, slot_BxL, axis=1)
    if count > 1 and not tokens.continues:
      return cls(module, slots, slot_BxL, positions_BxL, valid_BxL, True)
    if size + count - 1 > room:
      raise ValueError(f'{count} tokens go on; the cache was made for {room + 1 - size} at most')
    filled_BxS = _filled(total_B, slots)
    return cls(module, slots, slot_BxL, position.value, filled_BxS, False)

  def extend(self, name: str, new_BxLxGxK: jax.Array, layout: Layout) -> jax.Array:
    """Writes the keys, or the values, of the call's tokens; returns those to be read, `[B, S, G, K]`."""
    cached = self.module.variable('cache', name, layout.empty, new_BxLxGxK, self.slots)
    if self.module.is_initializing():
      return new_BxLxGxK
    cached.value = layout.write(cached.value, new_BxLxGxK, self.slot_BxL)
    return new_BxLxGxK if self.reads_new else layout.read(cached.value, len(self.slot_BxL))


def extend(
  module: nn.Module, size: int, tokens: Tokens, k_BxLxGxK: jax.Array, v_BxLxGxK: jax.Array
) -> KeyValues:
  """Writes the keys of valid tokens behind the cached ones; returns the keys and values to be read.

  Args:
    module: keeps them in its `cache` collection.
    size: keys behind and including its own that a query reads at most.
    tokens: whose keys they are.
  """
  cache = Cache.of(module, size, tokens)
  k_BxSxGxK = cache.extend('keys', k_BxLxGxK, KEYS)
  v_BxSxGxK = cache.extend('values', v_BxLxGxK, VALUES)
  return KeyValues(k_BxSxGxK, v_BxSxGxK, cache.positions, cache.valid)


def truncated(cache: Tree, position_B: jax.Array) -> Tree:
  """The `cache` collection without the tokens at `position`, int32 `[B]`, and behind it.

  At most as many tokens as go on in one call may be taken back, but for one: what older tokens they have
  overwritten is then read no more. Each layer takes back those that entered it.
  """
  if LENGTH not in cache:
    return {
      name: truncated(own, position_B) if isinstance(own, Mapping) else own
      for name, own in cache.items()
    }
  position_BxS, length_B = cache[POSITION], cache[LENGTH]
  there_BxS = _filled(length_B, position_BxS.shape[1]) & (position_BxS != NOWHERE)
  dropped_BxS = there_BxS & (position_BxS >= position_B[:, None])
  return {
    **cache,
    LENGTH: length_B - jnp.sum(dropped_BxS, axis=1, dtype=jnp.int32),
    POSITION: jnp.where(dropped_BxS, NOWHERE, position_BxS),
  }


def _filled(length_B: jax.Array, slots: int) -> jax.Array:
  """Which slots have tokens, bool `[B, S]`."""
  return jnp.arange(slots) < jnp.minimum(length_B, slots - 1)[:, None]
