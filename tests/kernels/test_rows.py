"""Rows by index, and their gradients, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels.rows import inverse_index, take_rows, take_rows_of_each


def test_rows_are_taken_and_their_gradients_go_back_where_they_came_from():
  draw, rows, places = np.random.default_rng(0), 5, 7
  x = draw.normal(size=(rows, 3)).astype('f')
  index = np.array([4, 0, rows, 4, 2, 1, rows], np.int32)  # row 3 goes nowhere
  went = [[i for i in range(places) if index[i] == row] for row in range(rows)]
  inverse = np.array([[*at, places, places][:2] for at in went], np.int32)
  toward = draw.normal(size=(places, 3)).astype('f')
  found, pullback = jax.vjp(lambda x: take_rows(x, index, inverse), jnp.asarray(x))
  assert_array_equal(found, [x[i] if i < rows else np.zeros(3) for i in index])
  want = [sum((toward[i] for i in at), np.zeros(3)) for at in went]
  assert_allclose(pullback(toward)[0], want, rtol=1e-6)


def test_rows_of_each_sequence_are_taken_and_put_back():
  draw, sequences, rows = np.random.default_rng(1), 3, 6
  x = draw.normal(size=(sequences, rows, 2)).astype('f')
  index = np.stack([draw.permutation(rows)[:4] for _ in range(sequences)]).astype('i')
  place = inverse_index(index, rows)
  want = [[list(one).index(row) if row in one else 4 for row in range(rows)] for one in index]
  assert_array_equal(place, want)
  taken = take_rows_of_each(x, index, place)
  assert_array_equal(taken, [x[b, one] for b, one in enumerate(index)])
  back, pullback = jax.vjp(lambda taken: take_rows_of_each(taken, place, index), taken)
  kept = np.asarray(place)[..., None] < 4
  assert_array_equal(back, np.where(kept, x, 0))
  assert_array_equal(pullback(x)[0], taken)
