"""Cuts windows of tokens on the device, so that only their starts are copied to it."""

import jax
import jax.numpy as jnp


def gather(tokens_N: jax.Array, starts_B: jax.Array, length: int) -> jax.Array:
  """Returns the windows of `length` tokens that begin at `starts_B`, int32 `[B, length]`.

  Args:
    tokens_N: tokens of any integer dtype.
    starts_B: integers from 0 to N - length (`Data.starts`); larger starts give the last window.
    length: number of tokens per window; in training, the context plus one.
  """

  def cut(start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(tokens_N, (start,), (length,))

  return jax.vmap(cut)(starts_B).astype(jnp.int32)
