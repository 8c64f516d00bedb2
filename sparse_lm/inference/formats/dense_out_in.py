"""Dense kernels, stored output by output."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.format import Array, Format, rows

DISPLAY_NAME = 'dense, stored by output'

LANES = 32


class DenseOutIn(Format):
  """The transposed kernel `[out, in]`.

  A product with one token reads one output's weights after the other. On a CPU, this reaches 90 % of
  the memory bandwidth; `[in, out]` reaches 80 %.
  """

  outputs: Array
  plain: ClassVar[bool] = True
  selects: ClassVar[int | None] = -1

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'DenseOutIn':
    """Stores every weight, with zeros for dropped weights."""
    return cls(np.ascontiguousarray((kernel * mask).T))

  def kernel(self) -> Array:
    """Returns the kernel as a transposed view."""
    return self.outputs.T

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return self.outputs.shape[::-1]

  def matmul(self, x: Array) -> Array:
    """Multiplies `x` with the whole kernel, output by output for a single token."""
    if x.size == x.shape[-1]:
      return (self.outputs @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
    flat = x.reshape(-1, x.shape[-1]) @ self.outputs.T
    return flat.reshape(*x.shape[:-1], -1)

  def of_outputs(self, x_I: Array, index_K: Array) -> Array:
    """Returns some outputs of one token, for which it reads K rows.

    On a CPU, it multiplies while it reads, in lanes, without gathering the rows first.
    """
    gathered = lambda x, index: rows(self.outputs, index) @ x  # noqa: E731
    if len(x_I) % LANES:
      return gathered(x_I, index_K)
    pair = jnp.asarray(x_I), jnp.asarray(index_K)
    return jax.lax.platform_dependent(*pair, cpu=self._in_lanes, default=gathered)

  def _in_lanes(self, x_I: Array, index_K: Array) -> Array:
    sums_KxP = jnp.zeros((len(index_K), LANES), jnp.float32)
    for first in range(0, len(x_I), LANES):
      part = slice(first, first + LANES)
      sums_KxP += rows(self.outputs[:, part], index_K) * x_I[part].astype(jnp.float32)
    sums_K = sums_KxP @ np.ones(LANES, np.float32)
    return sums_K.astype(jnp.result_type(x_I, self.outputs))
