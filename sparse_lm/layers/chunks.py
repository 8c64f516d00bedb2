"""Sums over the active units of one token, a chunk of units at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels.topk import true_indices

# One chunk holds this factor times the planned number of units, so usually one chunk suffices.
SPARE = 1.15
LANES = 32


def in_chunks(
  chosen_F: jax.Array, planned: float, some: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  """Returns the sum of `some(index_K, live_K)` over chunks of the chosen units.

  `live_K` is false for the padding of the last chunk.
  """
  units = chosen_F.size
  wanted = max(1, min(units, round(SPARE * planned * units)))
  room = -(-wanted // LANES) * LANES
  count = jnp.sum(chosen_F, dtype=jnp.int32)

  def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    first, total = carry
    index_K = true_indices(chosen_F, room, first)
    return first + room, total + some(index_K, first + jnp.arange(room) < count)

  index, live = jax.ShapeDtypeStruct((room,), jnp.int32), jax.ShapeDtypeStruct((room,), bool)
  out = jax.eval_shape(some, index, live)
  start = jnp.int32(0), jnp.zeros(out.shape, out.dtype)
  return jax.lax.while_loop(lambda carry: carry[0] < count, add, start)[1]
