"""The base class of packed formats, which store and multiply only the kept weights of a kernel.

Each format is one file under `inference/formats/` with one public class. It works on arrays and masks
and knows no modules. Some formats are for the disk only: they are converted to another format before
decoding.
"""

import math
from typing import ClassVar

import jax
import numpy as np
from flax import struct

from sparse_lm.kernels.matmul import matmul

Array = jax.Array


class Format(struct.PyTreeNode):
  """A packed kernel `[..., in, out]`; leading axes are experts. The base class of all formats.

  Attributes:
    runs: whether the format can multiply. If not, it is for the disk only.
    plain: whether it stores every weight and nothing else. Any kernel fits such a format.
    stacks: whether it takes kernels with leading axes. If it also runs, it defines `of_expert`.
    selects: the axis along which one token can read only what a method has selected: -1 for outputs
      (it then defines `of_outputs`), -2 for inputs (`of_inputs`), `None` for neither.
  """

  runs: ClassVar[bool] = True
  plain: ClassVar[bool] = False
  stacks: ClassVar[bool] = False
  selects: ClassVar[int | None] = None

  @classmethod
  def refuses(cls, mask: np.ndarray) -> str:
    """Returns the reason why this format cannot store a kernel with this mask; '' if it can."""
    if mask.ndim > 2 and not cls.stacks:
      return 'experts are stacked'
    return cls.misfit(mask)

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Returns the same as `refuses`, for a mask whose number of axes is already checked."""
    return ''

  @classmethod
  def example(cls, draw: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """Returns a random bool mask that suits the format and has about the given density.

    `inference/time_formats.py` measures costs with such masks. A format that stores every weight
    returns a mask that keeps all weights.
    """
    return np.ones(shape, bool)

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Format':
    """Packs the weights that the mask keeps."""
    raise NotImplementedError(cls.__name__)

  def kernel(self) -> Array:
    """Returns the kernel `[..., in, out]`, with zeros for weights that are not stored."""
    raise NotImplementedError(type(self).__name__)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`, computed without unpacking."""
    raise NotImplementedError(type(self).__name__)

  def matmul(self, x: Array) -> Array:
    """Multiplies `x` `[..., in]` with the kernel; returns `[..., out]`."""
    raise NotImplementedError(type(self).__name__)

  def of_outputs(self, x_I: Array, index_K: Array) -> Array:
    """Returns the outputs `[K]` of one token at `index_K`, which is sorted and has no repeats."""
    return self.matmul(x_I)[index_K]

  def of_inputs(self, x_K: Array, index_K: Array) -> Array:
    """Returns the outputs `[out]` of one token whose inputs are zero except `x_K` at `index_K`.

    Args:
      x_K: the inputs that are not zero.
      index_K: their indices, sorted and without repeats.
    """
    raise NotImplementedError(type(self).__name__)

  def of_expert(self, x: Array, expert: int) -> Array:
    """Multiplies rows `[P, in]` with the kernel of one expert; returns `[P, out]`."""
    raise NotImplementedError(type(self).__name__)

  @property
  def nbytes(self) -> int:
    """Bytes of all stored arrays, indices and mask bits included."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))


class InputMajor(Format):
  """A kernel `[in, out]` stored densely, zeros included; the base class of formats that do so."""

  inputs: Array

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'InputMajor':
    """Stores every weight, with zeros for dropped weights."""
    return cls(np.ascontiguousarray(kernel * mask))

  def kernel(self) -> Array:
    """Returns the stored kernel."""
    return self.inputs

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return self.inputs.shape

  def matmul(self, x: Array) -> Array:
    """Multiplies `x` with the whole kernel in one matrix product."""
    return matmul(x, self.inputs)


def rows(array: Array, index: Array) -> Array:
  """Returns `array[index]`, unchecked; `index` must be in range, sorted and free of repeats."""
  return array.at[index].get(mode='promise_in_bounds', indices_are_sorted=True, unique_indices=True)


def is_packed(node: object) -> bool:
  """Returns whether a node is a packed kernel; an `is_leaf` argument for `jax.tree` functions."""
  return isinstance(node, Format)
