"""The key/value cache of a layer."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.tree import Tree
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.kernels.cache import KEYS, VALUES, Layout, all_means, one_mean, slots_for, write
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record

LENGTH, POSITION = 'length', 'position'
DROPPED_POSITION = jnp.iinfo(jnp.int32).max  # later than every query, so no causal query reads it


@dataclasses.dataclass(frozen=True)
class Cache:
  """The slots of one call's tokens in the `cache` collection of a module, and the tokens to read.

  The collection is allocated once: with slots for all tokens that a later token can read, and for as
  many new tokens as the allocating call has. Each layer counts the tokens of each sequence separately,
  so a token that skips a layer takes no slot there. In a full cache, the next token replaces the oldest
  one. Tokens that continue a sequence read all cached tokens, themselves included. Tokens that begin a
  sequence read each other, even those without a slot.

  Attributes:
    module: the module that owns the variables.
    slots: number of slots per sequence; the last slot is never read.
    slot_BxL: int32, the slot of each token of the call.
    positions: int32 `[B, S]`, positions of the tokens to read.
    valid: bool `[B, S]`, which slots hold a token to read.
    reads_new: whether the call reads its own tokens instead of the cached ones.
  """

  module: nn.Module
  slots: int
  slot_BxL: jax.Array
  positions: jax.Array
  valid: jax.Array
  reads_new: bool

  @classmethod
  def of(cls, module: nn.Module, size: int, tokens: Tokens) -> 'Cache':
    """Assigns slots of a module's cache to the valid tokens of a call.

    Args:
      module: the module that owns the cache.
      size: the most tokens that a query reads.
      tokens: the tokens of the call.

    Raises:
      ValueError: several tokens continue a sequence and would overwrite tokens that the first one reads.
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
      raise ValueError(
        f'{count} tokens continue a sequence; the cache was allocated for at most {room + 1 - size}'
      )
    filled_BxS = _filled(total_B, slots)
    return cls(module, slots, slot_BxL, position.value, filled_BxS, False)

  def extend(
    self, name: str, new_BxLxGxK: jax.Array, layout: Layout, counted: bool = True
  ) -> jax.Array:
    """Writes the keys or values of the call's tokens; returns those to read, `[B, S, G, K]`.

    Args:
      name: name of the cached variable.
      new_BxLxGxK: keys or values of the call's tokens.
      layout: layout of the cached array.
      counted: whether to record the whole array as read. A caller that reads only a part records the
        bytes itself.
    """
    cached = self.module.variable('cache', name, layout.empty, new_BxLxGxK, self.slots)
    if self.module.is_initializing():
      return new_BxLxGxK
    cached.value = layout.write(cached.value, new_BxLxGxK, self.slot_BxL)
    if self.reads_new:
      return new_BxLxGxK
    read = layout.read(cached.value, len(self.slot_BxL))
    return record.read(read, self.module.path, name, read.nbytes) if counted else read

  def means(self, name: str, block: int, count: int) -> jax.Array | None:
    """Returns the mean of each block of cached keys, float32 `[B, count, G, K]`.

    The mean is computed from the cached keys when the last key of a block is written. So nothing must be
    undone if tokens are taken back and others are written to their slots. The mean of a block that is not
    full is undefined. If the call reads its own tokens, the result is `None`.

    Args:
      name: name of the cached keys.
      block: number of keys in a block.
      count: number of blocks. The cache must never hold more keys, because then they would not be in
        order.
    """
    cached = self.module.get_variable('cache', name)
    (m, width, _), b = cached.shape, len(self.slot_BxL)
    shape = (m, count, width)
    kept = self.module.variable('cache', f'{name}_means', jnp.zeros, shape, jnp.float32)
    if self.module.is_initializing():
      return None
    if self.slot_BxL.shape[1] > 1:
      kept.value = all_means(cached, block, count)
    else:
      kept.value = self._with_last(kept.value, cached, block)
    return None if self.reads_new else VALUES.read(kept.value, b)

  def _with_last(self, means_MxNxK: jax.Array, keys: jax.Array, block: int) -> jax.Array:
    """Updates the means of the blocks that the call's token (one per sequence) fills."""
    slot_B, (m, count, _) = self.slot_BxL[:, 0], means_MxNxK.shape
    full_B = (slot_B < self.slots - 1) & ((slot_B + 1) % block == 0)
    here_BxN = (jnp.arange(count) == slot_B[:, None] // block) & full_B[:, None]

    def taken() -> jax.Array:
      here_MxNx1 = jnp.repeat(here_BxN, m // len(slot_B), axis=0)[..., None]
      return jnp.where(here_MxNx1, one_mean(keys, block, slot_B // block), means_MxNxK)

    return jax.lax.cond(jnp.any(full_B), taken, lambda: means_MxNxK)


def extend(
  module: nn.Module,
  size: int,
  tokens: Tokens,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  block: int | None = None,
) -> KeyValues:
  """Appends the keys and values of valid tokens to the cache; returns the keys and values to read.

  Args:
    module: the module that owns the `cache` collection.
    size: the most keys that a query reads, up to and including its own.
    tokens: the tokens of the keys.
    k_BxLxGxK: their keys.
    v_BxLxGxK: their values.
    block: number of keys in a block whose mean is also cached; `None` means no blocks.
  """
  count = None if block is None else -(-size // block)
  cache = Cache.of(module, size if block is None else count * block, tokens)
  k_BxSxGxK = cache.extend('keys', k_BxLxGxK, KEYS, counted=False)
  v_BxSxGxK = cache.extend('values', v_BxLxGxK, VALUES, counted=False)
  means = None if block is None else cache.means('keys', block, count)
  cached = not cache.reads_new
  return KeyValues(k_BxSxGxK, v_BxSxGxK, cache.positions, cache.valid, means=means, cached=cached)


def truncated(cache: Tree, position_B: jax.Array) -> Tree:
  """Removes the tokens at `position_B`, int32 `[B]`, and after it from the `cache` collection.

  If a call can append n tokens, at most n - 1 may be removed: then no later query needs the older tokens
  that they have overwritten. Each layer removes the tokens that entered it.
  """
  if LENGTH not in cache:
    return {
      name: truncated(own, position_B) if isinstance(own, Mapping) else own
      for name, own in cache.items()
    }
  position_BxS, length_B = cache[POSITION], cache[LENGTH]
  there_BxS = _filled(length_B, position_BxS.shape[1]) & (position_BxS != DROPPED_POSITION)
  dropped_BxS = there_BxS & (position_BxS >= position_B[:, None])
  return {
    **cache,
    LENGTH: length_B - jnp.sum(dropped_BxS, axis=1, dtype=jnp.int32),
    POSITION: jnp.where(dropped_BxS, DROPPED_POSITION, position_BxS),
  }


def _filled(length_B: jax.Array, slots: int) -> jax.Array:
  """Returns which slots hold tokens, bool `[B, S]`."""
  return jnp.arange(slots) < jnp.minimum(length_B, slots - 1)[:, None]
