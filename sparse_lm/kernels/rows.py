"""Gathers of rows whose gradient is a gather, too."""

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def take_rows(x: Array, index: Array, inverse: Array) -> Array:
  """Returns `x[index]`, with zeros for indices out of range.

  The gradient is a gather by `inverse`, because a scatter-add is many times slower on a CPU.

  Args:
    x: `[N, D]`.
    index: int32 `[M]`.
    inverse: int32 `[N, R]`, where each row of `x` occurs in `index`; M means that it does not.
  """
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


def _forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
  return take_rows(x, index, inverse), inverse


def _backward(inverse: Array, gradient: Array) -> tuple[Array, None, None]:
  parts = [
    jnp.take(gradient, inverse[:, i], axis=0, mode='fill', fill_value=0)
    for i in range(inverse.shape[1])
  ]
  return sum(parts), None, None


take_rows.defvjp(_forward, _backward)


def inverse_index(index_BxM: Array, rows: int) -> Array:
  """Returns where each row of a sequence occurs in `index_BxM`: int32 `[B, rows]`; M means nowhere.

  Args:
    index_BxM: int32, indices of rows of each sequence, without repeats.
    rows: number of rows of a sequence.
  """
  sequence_Bx1 = jnp.arange(len(index_BxM))[:, None]
  place_M = jnp.arange(index_BxM.shape[1], dtype=jnp.int32)
  return jnp.full((len(index_BxM), rows), place_M.size).at[sequence_Bx1, index_BxM].set(place_M)


def take_rows_of_each(x_BxLxD: Array, index_BxM: Array, place_BxL: Array) -> Array:
  """Gathers rows of each sequence of a batch: `[B, M, D]`, with zeros for indices out of range.

  Args:
    x_BxLxD: rows of each sequence.
    index_BxM: int32, indices of rows of each sequence, without repeats.
    place_BxL: `inverse_index(index_BxM, L)`. Exchanging both arguments moves the rows back.
  """
  return jax.vmap(take_rows)(x_BxLxD, index_BxM, place_BxL[..., None])
