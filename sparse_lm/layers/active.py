"""Decodes one token by reading only the weights of its active hidden units."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels.topk import true_indices
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod

# One chunk holds this factor times the planned number of units, so usually one chunk suffices.
SPARE = 1.15
LANES = 32


def selects(activation: LayerMethod) -> bool:
  """Returns whether an activation keeps some units of each token and sets the others to zero."""
  return activation.traits.gating is not None


def one_token(x_BxLxD: jax.Array, mode: str) -> bool:
  """Returns whether a single token is decoded; several tokens may have different active units."""
  return mode == 'decode' and x_BxLxD.size == x_BxLxD.shape[-1]


def project(down: Linear, h_BxLxF: jax.Array, activation: LayerMethod, mode: str) -> jax.Array:
  """Returns `down(h)`.

  If one token is decoded, the weights are packed and the activation selects units, only the weights of
  nonzero units are read.
  """
  if not down.gathers or not selects(activation) or not one_token(h_BxLxF, mode):
    return down(h_BxLxF)
  run = down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    return run.of_inputs(jnp.where(live_K, h_BxLxF[..., index_K], 0), index_K)

  return run.add_bias(_in_chunks(h_BxLxF.reshape(-1) != 0, activation.traits.gating.planned, some))


def up_and_down(
  up: Linear,
  down: Linear,
  x_BxLxD: jax.Array,
  gate_BxLxF: jax.Array,
  chosen_BxLxF: jax.Array,
  planned: float,
  mode: str,
) -> jax.Array | None:
  """Returns `down(gate * up(x))` of one token, and reads only the weights of the chosen units.

  Args:
    up: the up-projection.
    down: the down-projection.
    x_BxLxD: inputs of the MLP.
    gate_BxLxF: factors of the hidden units; zero for units that are not chosen.
    chosen_BxLxF: bool, which units are chosen.
    planned: expected fraction of chosen units.
    mode: 'train', 'eval' or 'decode'.

  Returns:
    `[B, L, D]`, or `None` if there are several tokens or the packed format cannot read single units.
  """
  if not down.gathers or not one_token(x_BxLxD, mode):
    return None
  run_up, run_down = up.packed(), down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    gate = jnp.where(live_K, gate_BxLxF[..., index_K], 0)
    return run_down.of_inputs(gate * run_up.of_outputs(x_BxLxD, index_K), index_K)

  return run_down.add_bias(_in_chunks(chosen_BxLxF.reshape(-1), planned, some))


def _in_chunks(
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
