"""Windows of tokens that are cut on the device, so that only their starts are sent to it."""

import jax
import jax.numpy as jnp


def gather(tokens_N: jax.Array, starts_B: jax.Array, length: int) -> jax.Array:
  """The windows of `length` tokens that begin at `starts_B`, int32 `[B, length]`; pure.

  Args:
    tokens_N: of any integer type; of `Data.tokens`, uint8 or uint16.
    starts_B: integers from 0 to N - length, see `Data.starts`; a start beyond is moved to the
      last window.
    length: the tokens of a window; in training, the context plus one.
  """

  def cut(start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(tokens_N, (start,), (length,))

  return jax.vmap(cut)(starts_B).astype(jnp.int32)
