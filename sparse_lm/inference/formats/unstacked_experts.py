"""All weights of stacked experts, each expert's apart."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from sparse_lm.core.format import Array, Format


class UnstackedExperts(Format):
  """The transposed kernels `[out, in]` of experts, as many arrays.

  An array is read where it lies. Out of a stack XLA:CPU first copies the matrix that it multiplies with,
  even by a static index within a branch.
  """

  outputs: tuple[Array, ...]
  plain: ClassVar[bool] = True
  stacks: ClassVar[bool] = True

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Kernels that are no stack."""
    return '' if mask.ndim == 3 else 'not a stack of kernels'

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'UnstackedExperts':
    """Zeros are stored like other weights."""
    return cls(tuple(np.ascontiguousarray(one.T) for one in kernel * mask))

  def kernel(self) -> Array:
    """A stack of copies."""
    return jnp.stack([one.T for one in self.outputs])

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of what `kernel()` returns."""
    return (len(self.outputs), *self.outputs[0].shape[::-1])

  def of_expert(self, x: Array, expert: int) -> Array:
    """Reads that expert's array alone."""
    kernel = self.outputs[expert]
    return (kernel @ x[0])[None] if len(x) == 1 else x @ kernel.T
