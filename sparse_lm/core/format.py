"""Packed matrices: what is left of a kernel, stored so that only that is read and multiplied.

A format is a file of its own under `inference/formats/` with one public class. It sees arrays and masks,
never modules. Some are for the disk alone: another one runs in their place.
"""

import math
from typing import ClassVar

import jax
import numpy as np
from flax import struct

from sparse_lm.kernels.matmul import matmul

Array = jax.Array


class Format(struct.PyTreeNode):
  """A kernel `[..., in, out]` (leading axes: experts) in some layout; the base of all formats.

  Attributes:
    runs: whether it multiplies; if not it is for the disk.
    plain: whether it stores every weight and nothing else, which any kernel can be.
    stacks: whether it takes kernels with leading axes; if it runs, by `of_expert`.
    selects: the axis of which one token reads what a method has selected and no more: -1, outputs
      (`of_outputs`), or -2, inputs (`of_inputs`).
  """

  runs: ClassVar[bool] = True
  plain: ClassVar[bool] = False
  stacks: ClassVar[bool] = False
  selects: ClassVar[int | None] = None

  @classmethod
  def refuses(cls, mask: np.ndarray) -> str:
    """Why a kernel with this mask cannot be stored so; '' if it can."""
    if mask.ndim > 2 and not cls.stacks:
      return 'experts are stacked'
    return cls.misfit(mask)

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """`refuses` of a mask whose number of axes is right."""
    return ''

  @classmethod
  def example(cls, draw: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """A random mask, bool, that the format is meant for and of about that density.

    Costs are measured with it (`inference/time_formats.py`). A format that stores every weight takes
    any mask: its example keeps all.
    """
    return np.ones(shape, bool)

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Format':
    """Stores what the mask keeps."""
    raise NotImplementedError(cls.__name__)

  def kernel(self) -> Array:
    """`[..., in, out]` with zeros where nothing is stored."""
    raise NotImplementedError(type(self).__name__)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of `kernel()`, by the fields alone."""
    raise NotImplementedError(type(self).__name__)

  def matmul(self, x: Array) -> Array:
    """`[..., in]` to `[..., out]`."""
    raise NotImplementedError(type(self).__name__)

  def of_outputs(self, x_I: Array, index_K: Array) -> Array:
    """The outputs at `index` (sorted, none twice) of one token: `[K]`."""
    return self.matmul(x_I)[index_K]

  def of_inputs(self, x_K: Array, index_K: Array) -> Array:
    """The outputs `[out]` of one token whose inputs are zero but for those at `index`, as above."""
    raise NotImplementedError(type(self).__name__)

  def of_expert(self, x: Array, expert: int) -> Array:
    """Rows `[P, in]` through one of stacked kernels: `[P, out]`."""
    raise NotImplementedError(type(self).__name__)

  @property
  def nbytes(self) -> int:
    """Of all that is stored."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))


class InputMajor(Format):
  """The kernel `[in, out]` as it is, zeros stored like other weights: the base of formats that do so."""

  inputs: Array

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'InputMajor':
    """Stores every weight, with zeros where the mask drops one."""
    return cls(np.ascontiguousarray(kernel * mask))

  def kernel(self) -> Array:
    """The kernel as it is stored."""
    return self.inputs

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of what `kernel()` returns."""
    return self.inputs.shape

  def matmul(self, x: Array) -> Array:
    """Multiplies with the whole kernel in one product."""
    return matmul(x, self.inputs)


def rows(array: Array, index: Array) -> Array:
  """`array[index]` for an index in range, sorted and without repeats: no bounds are checked."""
  return array.at[index].get(mode='promise_in_bounds', indices_are_sorted=True, unique_indices=True)


def is_packed(node: object) -> bool:
  """For `jax.tree` functions that are to stop at formats."""
  return isinstance(node, Format)
