"""Decoding one token through the hidden units that are active, and no other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.select import compact
from sparse_lm.layers.linear import Linear

# Rooms for the active units, over what is planned; more than all of them run in full.
ROOMS = (1.0, 1.25, 2.0)
LANES = 32


def selects(activation: nn.Module) -> bool:
  """Whether an activation keeps some units of each token and zeroes the others."""
  return hasattr(activation, 'twin')


def one_token(x_BxLxD: jax.Array, mode: str) -> bool:
  """Whether a single token is decoded: only then do the units of all tokens agree."""
  return mode == 'decode' and x_BxLxD.size == x_BxLxD.shape[-1]


def project(down: Linear, h_BxLxF: jax.Array, activation: nn.Module, mode: str) -> jax.Array:
  """`down(h)`; of one token, packed, where the activation selects, from its non-zero units alone."""
  if not down.gathers or not selects(activation) or not one_token(h_BxLxF, mode):
    return down(h_BxLxF)
  run = down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    return run(jnp.where(live_K, h_BxLxF[..., index_K], 0), inputs=index_K)

  return _in_room(h_BxLxF.reshape(-1) != 0, activation.planned, some, lambda: run(h_BxLxF))


def up_and_down(
  up: Linear,
  down: Linear,
  x_BxLxD: jax.Array,
  gate_BxLxF: jax.Array,
  chosen_BxLxF: jax.Array,
  planned: float,
  mode: str,
) -> jax.Array | None:
  """`down(gate * up(x))` of one token from the chosen units alone, the others' gates being zero.

  `None` where weights are packed in no such format, or tokens are many. About `planned` are chosen.
  """
  if not down.gathers or not one_token(x_BxLxD, mode):
    return None
  run_up, run_down = up.packed(), down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    gate = jnp.where(live_K, gate_BxLxF[..., index_K], 0)
    return run_down(gate * run_up(x_BxLxD, outputs=index_K), inputs=index_K)

  every = lambda: run_down(gate_BxLxF * run_up(x_BxLxD))  # noqa: E731
  return _in_room(chosen_BxLxF.reshape(-1), planned, some, every)


def _in_room(
  chosen_F: jax.Array,
  planned: float,
  some: Callable[[jax.Array, jax.Array], jax.Array],
  every: Callable[[], jax.Array],
) -> jax.Array:
  """`some(index_K, which are real)` with the least room that the chosen fit in, or `every()`."""
  units = chosen_F.size
  rooms = sorted({-(-round(planned * units * room) // LANES) * LANES for room in ROOMS})
  rooms = [room for room in rooms if room < units]
  count = jnp.sum(chosen_F)

  def of(room: int) -> Callable[[], jax.Array]:
    return lambda: some(compact(chosen_F, room), jnp.arange(room) < count)

  branch = jnp.searchsorted(jnp.array(rooms, jnp.int32), count)
  return jax.lax.switch(branch, [*map(of, rooms), every])
