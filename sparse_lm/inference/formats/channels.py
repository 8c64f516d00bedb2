"""A dense kernel without empty rows and columns."""

import jax.numpy as jnp
import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format

DISPLAY_NAME = 'kept channels'


class Channels(Format):
  """The inputs and outputs of a kernel that have kept weights, as a smaller dense kernel.

  Attributes:
    weights: `[kept out, kept in]`.
    source: int32 `[kept in]`, the inputs to read.
    place: int32 `[out]`, the row of `weights` for each output; the number of rows means none, so the
      output is zero.
    inputs: number of inputs of the whole kernel.
  """

  weights: Array
  source: Array
  place: Array
  inputs: int = struct.field(pytree_node=False)

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Refuses kernels without an empty row or column."""
    empty = not (mask.any(axis=0).all() and mask.any(axis=1).all())
    return '' if empty and mask.any() else 'every input and output has kept weights'

  @classmethod
  def example(cls, draw: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """Keeps all weights of random inputs."""
    kept = draw.permutation(shape[0]) < max(round(density * shape[0]), 1)
    return np.broadcast_to(kept[:, None], shape)

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Channels':
    """Packs the kernel without its empty rows and columns."""
    source, kept = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    place = np.full(mask.shape[1], len(kept), np.int32)
    place[kept] = np.arange(len(kept))
    weights = np.ascontiguousarray((kernel * mask)[np.ix_(source, kept)].T)
    return cls(weights, source.astype(np.int32), place, mask.shape[0])

  def kernel(self) -> Array:
    """Returns the dense kernel."""
    rows = np.zeros((len(self.weights) + 1, self.inputs), self.weights.dtype)
    rows[:-1, self.source] = self.weights
    return jnp.asarray(rows[self.place].T)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return (self.inputs, len(self.place))

  def matmul(self, x: Array) -> Array:
    """Gathers the inputs, multiplies, and moves the outputs to their places."""
    flat = x.reshape(-1, x.shape[-1])[:, self.source] @ self.weights.T
    flat = jnp.pad(flat, ((0, 0), (0, 1)))[:, self.place]
    return flat.reshape(*x.shape[:-1], -1)
