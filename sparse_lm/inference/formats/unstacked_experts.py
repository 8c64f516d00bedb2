"""Dense kernels of experts, one array per expert."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from sparse_lm.core.format import Array, Format


class UnstackedExperts(Format):
  """The transposed kernels `[out, in]` of experts, as separate arrays.

  XLA:CPU reads a separate array in place. It would first copy an expert's matrix out of stacked kernels,
  even if the expert's index were a constant.
  """

  outputs: tuple[Array, ...]
  plain: ClassVar[bool] = True
  stacks: ClassVar[bool] = True

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Refuses kernels that are not stacked."""
    return '' if mask.ndim == 3 else 'not a stack of kernels'

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'UnstackedExperts':
    """Stores every weight, with zeros for dropped weights."""
    return cls(tuple(np.ascontiguousarray(one.T) for one in kernel * mask))

  def kernel(self) -> Array:
    """Returns the stacked kernels, as a copy."""
    return jnp.stack([one.T for one in self.outputs])

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return (len(self.outputs), *self.outputs[0].shape[::-1])

  def of_expert(self, x: Array, expert: int) -> Array:
    """Multiplies rows with the kernel of one expert, and reads only its array."""
    kernel = self.outputs[expert]
    return (kernel @ x[0])[None] if len(x) == 1 else x @ kernel.T
