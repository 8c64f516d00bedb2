"""Rows moved by index, with a gradient that moves them back."""

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def take_rows(x: Array, index: Array, inverse: Array) -> Array:
  """`x[index]`, zeros where the index is out of range.

  The gradient is a gather too, by `inverse`: a scatter-add is many times slower on a CPU.

  Args:
    x: `[N, D]`.
    index: int32 `[M]`.
    inverse: int32 `[N, R]`, the places in `index` that name each row of `x`; M = no place.
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


def places_of(index_BxM: Array, rows: int) -> Array:
  """The place in `index` of each row of a sequence: int32 `[B, rows]`, M for a row that is not in it.

  Args:
    index_BxM: int32, no row of a sequence twice.
    rows: the number of rows of a sequence.
  """
  sequence_Bx1 = jnp.arange(len(index_BxM))[:, None]
  place_M = jnp.arange(index_BxM.shape[1], dtype=jnp.int32)
  return jnp.full((len(index_BxM), rows), place_M.size).at[sequence_Bx1, index_BxM].set(place_M)


def take_rows_of_each(x_BxLxD: Array, index_BxM: Array, place_BxL: Array) -> Array:
  """Rows of each sequence of a batch: `[B, M, D]`, zeros where the index is out of range.

  Args:
    index_BxM: int32, no row of a sequence twice.
    place_BxL: `places_of(index_BxM, L)`. With the two exchanged the rows go back to their places.
  """
  return jax.vmap(take_rows)(x_BxLxD, index_BxM, place_BxL[..., None])
