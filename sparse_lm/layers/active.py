"""Decoding one token through the hidden units that are active, and no other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels.topk import compact
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod

# Units that are read at once, over what is planned: mostly all of them.
SPARE = 1.15
LANES = 32


def selects(activation: LayerMethod) -> bool:
  """Whether an activation keeps some units of each token and zeroes the others."""
  return activation.traits.gating is not None


def one_token(x_BxLxD: jax.Array, mode: str) -> bool:
  """Whether a single token is decoded: only then do the units of all tokens agree."""
  return mode == 'decode' and x_BxLxD.size == x_BxLxD.shape[-1]


def project(down: Linear, h_BxLxF: jax.Array, activation: LayerMethod, mode: str) -> jax.Array:
  """`down(h)`; of one token, packed, where the activation selects, from its non-zero units alone."""
  if not down.gathers or not selects(activation) or not one_token(h_BxLxF, mode):
    return down(h_BxLxF)
  run = down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    return run.of_inputs(jnp.where(live_K, h_BxLxF[..., index_K], 0), index_K)

  return run.biased(_in_chunks(h_BxLxF.reshape(-1) != 0, activation.traits.gating.planned, some))


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
    return run_down.of_inputs(gate * run_up.of_outputs(x_BxLxD, index_K), index_K)

  return run_down.biased(_in_chunks(chosen_BxLxF.reshape(-1), planned, some))


def _in_chunks(
  chosen_F: jax.Array, planned: float, some: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  """The sum of `some(index_K, which are real)` over chunks of the chosen units, as many as there are."""
  units = chosen_F.size
  wanted = max(1, min(units, round(SPARE * planned * units)))
  room = -(-wanted // LANES) * LANES
  count = jnp.sum(chosen_F, dtype=jnp.int32)

  def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    first, total = carry
    index_K = compact(chosen_F, room, first)
    return first + room, total + some(index_K, first + jnp.arange(room) < count)

  index, live = jax.ShapeDtypeStruct((room,), jnp.int32), jax.ShapeDtypeStruct((room,), bool)
  out = jax.eval_shape(some, index, live)
  start = jnp.int32(0), jnp.zeros(out.shape, out.dtype)
  return jax.lax.while_loop(lambda carry: carry[0] < count, add, start)[1]
