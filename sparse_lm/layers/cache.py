"""The tokens that a layer has seen, so that decoding need not see them again."""

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

  def extend(
    self, name: str, new_BxLxGxK: jax.Array, layout: Layout, counted: bool = True
  ) -> jax.Array:
    """Writes the keys, or the values, of the call's tokens; returns those to be read, `[B, S, G, K]`.

    Args:
      counted: whether all of it is noted as read; who reads a part of it notes that instead.
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
    """The mean of each block of the keys cached under a name, float32 `[B, count, G, K]`.

    A block's mean is taken when its last key is written, from what is cached of it then. So its keys are
    read once more, and nothing is to be undone where tokens are taken back and others written in their
    slots. Of a block that is not full the mean says nothing. Tokens that read each other get `None`.

    Args:
      block: keys of a block.
      count: blocks; the slots never hold more, or they are not in order.
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
    """The means, with those of the blocks that the call's one token of each sequence fills."""
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
  """Writes the keys of valid tokens behind the cached ones; returns the keys and values to be read.

  Args:
    module: keeps them in its `cache` collection.
    size: keys behind and including its own that a query reads at most.
    tokens: whose keys they are.
    block: keys of a block, where means of blocks are kept too.
  """
  count = None if block is None else -(-size // block)
  cache = Cache.of(module, size if block is None else count * block, tokens)
  k_BxSxGxK = cache.extend('keys', k_BxLxGxK, KEYS, counted=False)
  v_BxSxGxK = cache.extend('values', v_BxLxGxK, VALUES, counted=False)
  means = None if block is None else cache.means('keys', block, count)
  cached = not cache.reads_new
  return KeyValues(k_BxSxGxK, v_BxSxGxK, cache.positions, cache.valid, means=means, cached=cached)


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
