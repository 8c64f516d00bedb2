"""Dense kernels, stored input by input, for inputs with few nonzeros."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.format import Array, InputMajor, rows

DISPLAY_NAME = 'gathered rows'

ROWS = 16


class Gather(InputMajor):
  """The dense kernel `[in, out]`. The product for a single token reads only the rows of nonzero inputs.

  It suits down-projections after a method that selects hidden units (exact top-k, predictors).
  """

  selects: ClassVar[int | None] = -2

  def of_inputs(self, x_K: Array, index_K: Array) -> Array:
    """Returns the outputs of one token, for which it reads K rows.

    On a CPU, it loops over a few rows at a time, which takes half the time of gathering them first.
    """
    gathered = lambda x, index: x @ rows(self.inputs, index)  # noqa: E731
    pair = jnp.asarray(x_K), jnp.asarray(index_K)
    return jax.lax.platform_dependent(*pair, cpu=self._row_by_row, default=gathered)

  def _row_by_row(self, x_K: Array, index_K: Array) -> Array:
    x_K, index_K = (jnp.pad(a, (0, -len(a) % ROWS)) for a in (x_K, index_K))

    def add(step: int, sum_O: Array) -> Array:
      for place in range(ROWS):
        k = ROWS * step + place
        row = jax.lax.dynamic_slice(self.inputs, (index_K[k], 0), (1, self.inputs.shape[1]))
        sum_O = sum_O + x_K[k].astype(jnp.float32) * row[0]
      return sum_O

    start = jnp.zeros(
      self.inputs.shape[1], jnp.float32
    )  # products of bfloat16 are summed in float32
    total = jax.lax.fori_loop(0, len(x_K) // ROWS, add, start)
    return total.astype(jnp.result_type(x_K, self.inputs))
