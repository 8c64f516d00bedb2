"""N of each M inputs, with their indices in the group; for the disk."""

from typing import ClassVar

import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format

DISPLAY_NAME = 'N:M'

GROUPS = (4, 8, 16, 32)


class NOfM(Format):
  """The layout of hardware with sparse tensor cores. Here, such kernels run dense.

  Attributes:
    values: `[in / M * N, out]`, the kept weights of each group in order.
    places: uint8, the index of each kept weight in its group, with `log2(M)` bits each.
    m: size of a group, M.
    inputs: number of inputs of the kernel.
  """

  values: Array
  places: Array
  m: int = struct.field(pytree_node=False)
  inputs: int = struct.field(pytree_node=False)
  runs: ClassVar[bool] = False

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Refuses masks whose groups keep different numbers of weights."""
    return '' if _group(mask) else 'groups of inputs keep different numbers of weights'

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'NOfM':
    """Packs the smallest groups that all keep the same number of weights."""
    m = _group(mask)
    grouped = mask.reshape(-1, m, mask.shape[1])
    n = int(grouped[0, :, 0].sum())
    place = np.argsort(~grouped, axis=1, kind='stable')[:, :n]  # [in / M, N, out]
    values = np.take_along_axis(kernel.reshape(grouped.shape), place, axis=1)
    bits = (place[..., None] >> np.arange(_bits(m))) & 1
    return cls(values.reshape(-1, mask.shape[1]), np.packbits(bits.astype(np.uint8)), m, len(mask))

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return (self.inputs, self.values.shape[1])

  def kernel(self) -> Array:
    """Returns the dense kernel."""
    rows, out = self.values.shape
    each = rows * self.m // self.inputs  # N
    bits = np.unpackbits(np.asarray(self.places), count=rows * out * _bits(self.m))
    place = (bits.reshape(rows, out, -1) << np.arange(_bits(self.m))).sum(axis=-1)
    first = np.arange(rows) // each * self.m
    full = np.zeros((self.inputs, out), self.values.dtype)
    np.put_along_axis(full, place + first[:, None], np.asarray(self.values), axis=0)
    return full


def _bits(m: int) -> int:
  return (m - 1).bit_length()


def _group(mask: np.ndarray) -> int:
  """Returns the smallest M whose groups all keep the same number N < M of weights; 0 if there is none."""
  for m in GROUPS:
    if len(mask) % m == 0:
      counts = mask.reshape(-1, m, mask.shape[1]).sum(axis=1)
      if 0 < counts[0, 0] < m and (counts == counts[0, 0]).all():
        return m
  return 0
