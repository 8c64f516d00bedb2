"""Kept weights plus one mask bit per weight, for storage on disk."""

from typing import ClassVar

import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format

DISPLAY_NAME = 'bit mask'


class Bitmask(Format):
  """The kept weights and a bit mask, for storage. The model runs the dense kernel, so no time is saved.

  Attributes:
    values: the kept weights, in the kernel's order.
    bits: uint8, the mask, with eight weights per byte.
    dimensions: shape of the kernel.
  """

  values: Array
  bits: Array
  dimensions: tuple[int, ...] = struct.field(pytree_node=False)
  runs: ClassVar[bool] = False
  stacks: ClassVar[bool] = True

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Refuses masks that keep every weight."""
    return 'nothing is dropped' if mask.all() else ''

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Bitmask':
    """Packs the weights that the mask keeps, including kept weights that are zero."""
    return cls(kernel[mask], np.packbits(mask), tuple(mask.shape))

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return self.dimensions

  def kernel(self) -> Array:
    """Returns the dense kernel."""
    size = int(np.prod(self.dimensions))
    mask = np.unpackbits(np.asarray(self.bits), count=size).astype(bool).reshape(self.dimensions)
    full = np.zeros(self.dimensions, self.values.dtype)
    full[mask] = self.values
    return full
