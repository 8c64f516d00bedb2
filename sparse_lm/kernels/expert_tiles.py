"""Grouped matmul on NVIDIA GPUs: Pallas kernels, compiled by Triton.

Each block of rows is multiplied by the matrix of its group, which is read directly from the stacked
matrices. So no matrix is copied, and blocks without a group cost nothing. The gradient of the rows is the
same product with transposed matrices; the gradient of a matrix is a sum over the blocks of its group.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array

ROWS = 128  # number of rows of a block that fills a tile
SIZES = (128, 64, 32, 16)  # possible sizes of a tile's axes; tensor cores need at least 16
BLOCKS_TOGETHER = (
  8  # blocks of rows whose tiles run next to each other, to share matrices in the cache
)
MAX_ELEMENTS = 2**31 - 1  # most elements of an array, because kernels index it with int32


def fits(rows: int, shape: tuple[int, int, int], blocks: int) -> bool:
  """Returns whether the kernels support blocks of `rows` rows and a stack `[E, I, F]`, by their sizes."""
  sizes = (rows, *shape[1:])
  widest = blocks * rows * max(shape[1:])
  return (
    all(size % SIZES[-1] == 0 for size in sizes) and max(math.prod(shape), widest) <= MAX_ELEMENTS
  )


@jax.custom_vjp
def product(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array) -> Array:
  """Multiplies each block of rows by the matrix of its group: `[N, P, F]`, with sums in float32.

  On other devices, a loop over blocks computes the same.

  Args:
    x_NxPxI: blocks of rows.
    kernel_ExIxF: the stacked matrices, in the dtype of the rows.
    group_N: int32, the group of each block, ascending; E means no group and gives zeros.
  """
  return _rows(x_NxPxI, kernel_ExIxF, group_N, False)


def _forward(x: Array, kernel: Array, group_N: Array) -> tuple[Array, tuple[Array, ...]]:
  return product(x, kernel, group_N), (x, kernel, group_N)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
  x, kernel, group_N = saved
  to_x = _rows(gradient, kernel, group_N, True)
  groups = len(kernel)
  to_kernel = jax.lax.platform_dependent(
    *(x, gradient, group_N),
    cuda=functools.partial(matrices_in_tiles, groups=groups),
    default=functools.partial(matrices_by_loop, groups=groups),
  )
  return to_x, to_kernel, None


product.defvjp(_forward, _backward)


def _rows(x_NxPxI: Array, kernel: Array, group_N: Array, transposed: bool) -> Array:
  return jax.lax.platform_dependent(
    *(x_NxPxI, kernel, group_N),
    cuda=functools.partial(rows_in_tiles, transposed=transposed),
    default=functools.partial(rows_by_loop, transposed=transposed),
  )


def rows_by_loop(x_NxPxI: Array, kernel: Array, group_N: Array, transposed: bool) -> Array:
  """Computes the same as `rows_in_tiles`, block by block."""
  groups = len(kernel)

  def one(block: tuple[Array, Array]) -> Array:
    x_PxI, group = block
    matrix = kernel[jnp.minimum(group, groups - 1)]
    y_PxF = x_PxI @ (matrix.T if transposed else matrix)
    return jnp.where(group < groups, y_PxF, 0)

  return jax.lax.map(one, (x_NxPxI, group_N))


def matrices_by_loop(x_NxPxI: Array, y_NxPxF: Array, group_N: Array, groups: int) -> Array:
  """Computes the same as `matrices_in_tiles`, block by block."""

  def add(sum_ExIxF: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
    x_PxI, y_PxF, group = block
    own = jnp.einsum('pi,pf->if', x_PxI, y_PxF, preferred_element_type=jnp.float32)
    return sum_ExIxF.at[group].add(own, mode='drop'), None

  start = jnp.zeros((groups, x_NxPxI.shape[2], y_NxPxF.shape[2]), jnp.float32)
  total, _ = jax.lax.scan(add, start, (x_NxPxI, y_NxPxF, group_N))
  return total.astype(x_NxPxI.dtype)


class _Tiles(NamedTuple):
  """Sizes of a kernel's tiles: rows and columns of the result, and terms that one step sums."""

  rows: int
  columns: int
  step: int


def rows_in_tiles(
  x_NxPxI: Array, kernel: Array, group_N: Array, transposed: bool, interpret: bool = False
) -> Array:
  """Multiplies each block by the matrix `[I, F]` of its group, or by a transposed `[F, I]`: `[N, P, F]`.

  Args:
    x_NxPxI: blocks of rows.
    kernel: the stacked matrices.
    group_N: int32, the group of each block; `len(kernel)` means no group and gives zeros.
    transposed: whether to multiply by the transposed matrices.
    interpret: whether Pallas interprets the kernel instead of compiling it; for tests.
  """
  blocks, rows, inputs = x_NxPxI.shape
  outputs = kernel.shape[1 if transposed else 2]
  tiles = _Tiles(_largest(rows), _largest(outputs), _step(inputs, x_NxPxI.dtype))
  many = rows // tiles.rows  # a block of many rows is cut into blocks of one tile each
  flat = _call(
    functools.partial(_rows_tile, tiles, transposed),
    blocks * many * (outputs // tiles.columns),
    jax.ShapeDtypeStruct((blocks * rows, outputs), x_NxPxI.dtype),
    2 * x_NxPxI.size * outputs,
    interpret,
  )(jnp.repeat(group_N, many), x_NxPxI.reshape(-1, inputs), kernel)
  return flat.reshape(blocks, rows, outputs)


def _rows_tile(
  tiles: _Tiles, transposed: bool, group: Array, x: Array, kernel: Array, y: Array
) -> None:
  """Computes one tile of `rows_in_tiles`; arrays are references to device memory."""
  blocks, wide = group.shape[0], y.shape[1] // tiles.columns
  place = pl.program_id(0)
  first = place // (BLOCKS_TOGETHER * wide) * BLOCKS_TOGETHER
  near = jnp.minimum(blocks - first, BLOCKS_TOGETHER)
  inside = place % (BLOCKS_TOGETHER * wide)
  block, column = first + inside % near, inside // near
  rows = pl.ds(block * tiles.rows, tiles.rows)
  columns = pl.ds(column * tiles.columns, tiles.columns)
  own = group[block]

  def add(k: Array, total: Array) -> Array:
    terms = pl.ds(k * tiles.step, tiles.step)
    matrix = kernel[own, columns, terms] if transposed else kernel[own, terms, columns]
    return total + _dot(x[rows, terms], matrix, 1, int(transposed))

  steps = (own < kernel.shape[0]).astype(jnp.int32) * jnp.int32(x.shape[1] // tiles.step)
  start = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
  y[rows, columns] = jax.lax.fori_loop(jnp.int32(0), steps, add, start).astype(y.dtype)


def matrices_in_tiles(
  x_NxPxI: Array, y_NxPxF: Array, group_N: Array, groups: int, interpret: bool = False
) -> Array:
  """Sums `x.T @ y` over the blocks of each group: `[E, I, F]`; zeros for a group without blocks.

  Args:
    x_NxPxI: blocks of rows.
    y_NxPxF: blocks of rows.
    group_N: int32, the group of each block, ascending; `groups` means no group.
    groups: number of groups, E.
    interpret: whether Pallas interprets the kernel instead of compiling it; for tests.
  """
  rows, inputs = x_NxPxI.shape[1:]
  outputs = y_NxPxF.shape[2]
  tiles = _Tiles(_largest(inputs), _largest(outputs), _step(rows, x_NxPxI.dtype))
  before = group_N[None] < jnp.arange(groups + 1)[:, None]
  first = jnp.sum(before, axis=1, dtype=jnp.int32) * (rows // tiles.step)  # step of each group
  return _call(
    functools.partial(_matrices_tile, tiles),
    groups * (inputs // tiles.rows) * (outputs // tiles.columns),
    jax.ShapeDtypeStruct((groups, inputs, outputs), x_NxPxI.dtype),
    2 * x_NxPxI.size * outputs,
    interpret,
  )(first, x_NxPxI.reshape(-1, inputs), y_NxPxF.reshape(-1, outputs))


def _matrices_tile(tiles: _Tiles, first: Array, x: Array, y: Array, kernel: Array) -> None:
  """Computes one tile of `matrices_in_tiles`; arrays are references to device memory."""
  high, wide = kernel.shape[1] // tiles.rows, kernel.shape[2] // tiles.columns
  place = pl.program_id(0)
  group, inside = place // (high * wide), place % (high * wide)
  rows = pl.ds(inside % high * tiles.rows, tiles.rows)
  columns = pl.ds(inside // high * tiles.columns, tiles.columns)

  def add(k: Array, total: Array) -> Array:
    terms = pl.ds(k * tiles.step, tiles.step)
    return total + _dot(x[terms, rows], y[terms, columns], 0, 0)

  start = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
  total = jax.lax.fori_loop(first[group], first[group + 1], add, start)
  kernel[group, rows, columns] = total.astype(kernel.dtype)


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
  numbers = (((axis_of_a,), (axis_of_b,)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _call(
  tile: Callable[..., None], tiles: int, out: jax.ShapeDtypeStruct, flops: int, interpret: bool
) -> Callable[..., Array]:
  return pl.pallas_call(
    tile,
    out_shape=out,
    grid=(tiles,),
    interpret=interpret,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
    cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=0, transcendentals=0),
  )


def _largest(size: int) -> int:
  return next(tile for tile in SIZES if size % tile == 0)


def _step(size: int, dtype: jnp.dtype) -> int:
  """Returns the number of terms that one step sums; the tiles of three steps must fit in memory."""
  most = 128 // jnp.dtype(dtype).itemsize
  return next(step for step in SIZES if step <= most and size % step == 0)
