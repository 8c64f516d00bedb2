"""Decodes one token by reading only the weights of its active hidden units."""

import jax
import jax.numpy as jnp

from sparse_lm.layers.chunks import in_chunks
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod
from sparse_lm.plan import record


def selects(activation: LayerMethod) -> bool:
  """Returns whether an activation keeps some units of each token and sets the others to zero."""
  return activation.traits.gating is not None


def one_token(x_BxLxD: jax.Array, mode: str) -> bool:
  """Returns whether a single token is decoded; several tokens may have different active units."""
  return mode == 'decode' and x_BxLxD.size == x_BxLxD.shape[-1]


def _acted_on(*layers: Linear) -> bool:
  """Returns whether the inputs or outputs of a layer are read or replaced, so that all are needed."""
  return any(record.wanted(layer, name) for layer in layers for name in ('input', 'output'))


def project(down: Linear, h_BxLxF: jax.Array, activation: LayerMethod, mode: str) -> jax.Array:
  """Returns `down(h)`.

  If one token is decoded, the weights are packed and the activation selects units, only the weights of
  nonzero units are read.
  """
  if not (down.gathers and selects(activation) and one_token(h_BxLxF, mode)) or _acted_on(down):
    return down(h_BxLxF)
  run = down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    return run.of_inputs(jnp.where(live_K, h_BxLxF[..., index_K], 0), index_K)

  return run.add_bias(in_chunks(h_BxLxF.reshape(-1) != 0, activation.traits.gating.planned, some))


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
    `[B, L, D]`, or `None` if there are several tokens, the packed format cannot read single units, or an
    actor needs all inputs or outputs of a projection.
  """
  if not down.gathers or not one_token(x_BxLxD, mode) or _acted_on(up, down):
    return None
  run_up, run_down = up.packed(), down.packed()

  def some(index_K: jax.Array, live_K: jax.Array) -> jax.Array:
    gate = jnp.where(live_K, gate_BxLxF[..., index_K], 0)
    return run_down.of_inputs(gate * run_up.of_outputs(x_BxLxD, index_K), index_K)

  return run_down.add_bias(in_chunks(chosen_BxLxF.reshape(-1), planned, some))
