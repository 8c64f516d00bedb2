"""Square tiles; only tiles with at least one kept weight are stored."""

import math

import jax.numpy as jnp
import numpy as np
from flax import struct

from sparse_lm.core.format import Array, Format
from sparse_lm.kernels import device
from sparse_lm.kernels.matmul import matmul

DISPLAY_NAME = 'blocks of {}'

SIZES = (128, 64, 32, 16)


class Block(Format):
  """Tiles of b x b weights, in the order of their outputs.

  A product gathers each tile's inputs, multiplies, and sums the results. On a GPU with many rows,
  gathering inputs and summing outputs moves more memory than the kernel has. Then the tiles are first
  written to a dense kernel, which is multiplied instead.

  Attributes:
    tiles: the tiles, `[N, b out, b in]`.
    source: int32 `[N]`, the group of b inputs that each tile reads.
    parts: int32 `[out / b, P]`, the up to P tiles of each group of b outputs; N means no tile.
    groups: number of groups of inputs, in / b.
  """

  tiles: Array
  source: Array
  parts: Array
  groups: int = struct.field(pytree_node=False)

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Refuses kernels that no tile size divides, or that have no empty tile."""
    sizes = _dividing(mask)
    if not sizes:
      return f'no tile size ({", ".join(map(str, SIZES))}) divides {mask.shape}'
    if all(_occupied(mask, size).all() for size in sizes):
      return f'every tile of {sizes[-1]} x {sizes[-1]} has kept weights'
    return ''

  @classmethod
  def example(cls, draw: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """Keeps random tiles of the largest size below 128 that divides the shape."""
    size = next((size for size in SIZES[1:] if not any(axis % size for axis in shape)), SIZES[-1])
    tiles = shape[0] // size, shape[1] // size
    kept = draw.permutation(math.prod(tiles)).reshape(tiles) < max(
      round(density * math.prod(tiles)), 1
    )
    return np.kron(kept, np.ones((size, size), bool))

  @classmethod
  def pack(cls, kernel: np.ndarray, mask: np.ndarray) -> 'Block':
    """Packs tiles of the size that needs the fewest bytes."""
    sizes = {size: _occupied(mask, size).sum() * size**2 for size in _dividing(mask)}
    size = min(sizes, key=sizes.get)
    occupied_OxI = _occupied(mask, size).T
    out, source = np.nonzero(occupied_OxI)
    tiles = (kernel * mask).T.reshape(occupied_OxI.shape[0], size, occupied_OxI.shape[1], size)
    counts = occupied_OxI.sum(axis=1)
    parts = np.full((len(counts), max(counts.max(), 1)), len(out), np.int32)
    parts[np.arange(parts.shape[1]) < counts[:, None]] = np.arange(len(out))
    tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1, 3)[out, source])
    return cls(tiles, source.astype(np.int32), parts, occupied_OxI.shape[1])

  def kernel(self) -> Array:
    """Returns the dense kernel."""
    count, size = self.tiles.shape[:2]
    full = np.zeros((len(self.parts), size, self.groups, size), self.tiles.dtype)
    for out, parts in enumerate(np.asarray(self.parts)):
      for part in parts[parts < count]:
        full[out, :, int(self.source[part])] = self.tiles[part]
    return jnp.asarray(full.reshape(len(self.parts) * size, -1).T)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of `kernel()`."""
    return (self.groups * self.tiles.shape[1], len(self.parts) * self.tiles.shape[1])

  def matmul(self, x: Array) -> Array:
    """Returns `x @ kernel`, by one small product per tile or one product with the dense kernel."""
    moved = 2 * math.prod(self.tiles.shape[:2]) * (x.size // x.shape[-1])
    if device.compute_capability() is not None and moved > math.prod(self.shape):
      return matmul(x, self._whole())
    size = self.tiles.shape[1]
    x_TxGxb = x.reshape(-1, self.groups, size)
    part_NxTxb = jnp.einsum('noi,nti->nto', self.tiles, x_TxGxb[:, self.source].swapaxes(0, 1))
    padded = jnp.pad(part_NxTxb, ((0, 1), (0, 0), (0, 0)))
    y_OxTxb = jnp.sum(padded[self.parts], axis=1)
    return y_OxTxb.swapaxes(0, 1).reshape(*x.shape[:-1], -1)

  def _whole(self) -> Array:
    """Returns the dense kernel `[in, out]`, computed on the device."""
    size, outputs = self.tiles.shape[1], len(self.parts)
    output_N = jnp.zeros(len(self.tiles), jnp.int32)
    output_N = output_N.at[self.parts].set(jnp.arange(outputs)[:, None], mode='drop')
    whole = jnp.zeros((self.groups, outputs, size, size), self.tiles.dtype)
    whole = whole.at[self.source, output_N].set(self.tiles, unique_indices=True)
    return whole.transpose(0, 3, 1, 2).reshape(self.shape)


def _dividing(mask: np.ndarray) -> list[int]:
  return [size for size in SIZES if not any(axis % size for axis in mask.shape)]


def _occupied(mask: np.ndarray, size: int) -> np.ndarray:
  """Returns which tiles have kept weights, `[in / size, out / size]`."""
  i, o = mask.shape
  return mask.reshape(i // size, size, o // size, size).any(axis=(1, 3))
