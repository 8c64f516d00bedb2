"""Rows by index, and their gradients, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels.rows import take_rows


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
