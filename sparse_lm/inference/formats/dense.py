"""All weights, output by output."""

from typing import ClassVar

import numpy as np

from sparse_lm.core.packed import Array, Format, rows


class Dense(Format):
  """The transposed kernel `[..., out, in]`: a product with one token reads each output's weights in turn.

  On a CPU that reaches nine tenths of the memory's bandwidth, where `[in, out]` reaches eight.
  """

  outputs: Array
  plain: ClassVar[bool] = True
  stacks: ClassVar[bool] = True
  selects: ClassVar[int | None] = -1

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Dense':
    """Zeros are stored like other weights."""
    return cls(np.ascontiguousarray(np.swapaxes(kernel * mask, -1, -2)))

  def kernel(self) -> Array:
    """A transposed view."""
    return self.outputs.swapaxes(-1, -2)

  def matmul(self, x: Array) -> Array:
    """Of a kernel without leading axes."""
    if x.size == x.shape[-1]:
      return (self.outputs @ x.reshape(-1)).reshape(*x.shape[:-1], -1)
    flat = x.reshape(-1, x.shape[-1]) @ self.outputs.T
    return flat.reshape(*x.shape[:-1], -1)

  def of_outputs(self, x_I: Array, index_K: Array) -> Array:
    """Reads `K` rows."""
    return rows(self.outputs, index_K) @ x_I
