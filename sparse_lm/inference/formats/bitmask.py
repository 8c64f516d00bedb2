"""Kept weights and a bit for every weight: for the disk."""

from typing import ClassVar

import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format


class Bitmask(Format):
  """Unstructured masks save bytes and no time: they run dense.

  Attributes:
    values: the kept weights, in the kernel's order.
    bits: uint8, the mask, eight weights to the byte.
    dimensions: of the kernel.
  """

  values: Array
  bits: Array
  dimensions: tuple[int, ...] = struct.field(pytree_node=False)
  runs: ClassVar[bool] = False
  stacks: ClassVar[bool] = True

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Masks that keep everything."""
    return 'nothing is dropped' if mask.all() else ''

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Bitmask':
    """Zeros among the kept weights are kept."""
    return cls(kernel[mask], np.packbits(mask), tuple(mask.shape))

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of what `kernel()` returns."""
    return self.dimensions

  def kernel(self) -> Array:
    """The weights in their places."""
    size = int(np.prod(self.dimensions))
    mask = np.unpackbits(np.asarray(self.bits), count=size).astype(bool).reshape(self.dimensions)
    full = np.zeros(self.dimensions, self.values.dtype)
    full[mask] = self.values
    return full
