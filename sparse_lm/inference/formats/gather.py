"""All weights, input by input, for inputs of which few are not zero."""

from typing import ClassVar

import numpy as np

from sparse_lm.core.packed import Array, Format, rows


class Gather(Format):
  """The kernel `[in, out]` as it is: one token reads the rows of its active inputs and no other.

  For the down-projection behind a method that selects hidden units (exact top-k, predictors).
  """

  inputs: Array
  gathers: ClassVar[bool] = True

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Gather':
    """Zeros are stored like other weights."""
    return cls(np.ascontiguousarray(kernel * mask))

  def kernel(self) -> Array:
    """As stored."""
    return self.inputs

  def matmul(self, x: Array) -> Array:
    """For more than one token."""
    flat = x.reshape(-1, x.shape[-1]) @ self.inputs
    return flat.reshape(*x.shape[:-1], -1)

  def of_inputs(self, x_K: Array, index_K: Array) -> Array:
    """Reads `K` rows."""
    return x_K @ rows(self.inputs, index_K)
