"""Blocks of rows times matrices out of a stack: one function, the backend chosen inside."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels import device, expert_tiles

Array = jax.Array

# The most branches of conditionals that are compiled without a loop; each adds to the time of
# compilation.
UNROLLED = 64

COPIED_TO = 64  # rows of a block where each block gets a copy of its matrix


def grouped_matmul(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None = None) -> Array:
  """Each block of rows times the matrix of its group: `[N, P, F]`.

  With one row in each block (a token that is decoded) only the matrices of the named groups are read. On
  an NVIDIA GPU this holds for blocks of any size, and blocks without a group cost nothing. On other
  devices the matrices are copied for the blocks by a product with one-hot rows.

  Args:
    kernel_ExIxF: the stack, of any float dtype; it is cast to the dtype of the rows.
    group_N: int32, the group of each block, ascending where there is a gradient; E = no group, whose
      result is zeros. `None` = block i belongs to group i.
  """
  if _in_tiles(x_NxPxI, kernel_ExIxF, group_N):
    padded = jnp.pad(x_NxPxI, ((0, 0), (0, _empty_rows(x_NxPxI)), (0, 0)))
    y_NxPxF = expert_tiles.product(padded, kernel_ExIxF.astype(x_NxPxI.dtype), group_N)
    return y_NxPxF[:, : x_NxPxI.shape[1]]
  if group_N is not None and x_NxPxI.shape[1] == 1:
    of_group = lambda x, group: x @ kernel_ExIxF[group].astype(x.dtype)  # noqa: E731
    return one_by_one(of_group, len(kernel_ExIxF), x_NxPxI, group_N)
  kernel_NxIxF = of_blocks(kernel_ExIxF.astype(x_NxPxI.dtype), group_N)
  return jnp.einsum('npi,nif->npf', x_NxPxI, kernel_NxIxF)


def copied_flops(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None = None) -> float:
  """FLOPs that `grouped_matmul` executes on this device besides the products of the rows themselves."""
  if _in_tiles(x_NxPxI, kernel_ExIxF, group_N):
    return 2.0 * len(x_NxPxI) * _empty_rows(x_NxPxI) * math.prod(kernel_ExIxF.shape[1:])
  if group_N is not None and x_NxPxI.shape[1] == 1:
    return 0.0
  return selection_flops(kernel_ExIxF, group_N)


def block_rows(shape: tuple[int, int, int]) -> int:
  """The rows of a block with which this device runs `grouped_matmul` best for a stack `(E, I, F)`."""
  in_tiles = has_tiles() and expert_tiles.fits(expert_tiles.ROWS, shape, 1)
  return expert_tiles.ROWS if in_tiles else COPIED_TO


def has_tiles() -> bool:
  """Whether the kernels of `expert_tiles` run on this process' device: NVIDIA's GPUs since A100."""
  return device.is_recent_gpu()


def _in_tiles(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None) -> bool:
  """Whether blocks are multiplied by the kernels of `expert_tiles`."""
  if group_N is None or not has_tiles():
    return False
  rows = x_NxPxI.shape[1] + _empty_rows(x_NxPxI)
  return expert_tiles.fits(rows, kernel_ExIxF.shape, len(x_NxPxI))


def _empty_rows(x_NxPxI: Array) -> int:
  """Rows of zeros that fill a block with one row to a tile."""
  return expert_tiles.SIZES[-1] - 1 if x_NxPxI.shape[1] == 1 else 0


def of_blocks(stacked: Array, group_N: Array | None) -> Array:
  """The part of a stack `[E, ...]` that belongs to each block: `[N, ...]`; zeros for group E.

  A product with one-hot rows: its gradient is one too, where that of indexing is a scatter-add.
  """
  if group_N is None:
    return stacked
  chosen = jax.nn.one_hot(group_N, len(stacked), dtype=stacked.dtype)
  flat = chosen @ stacked.reshape(len(stacked), -1)
  return flat.reshape(-1, *stacked.shape[1:])


def selection_flops(stacked: Array, group_N: Array | None) -> float:
  """FLOPs that `of_blocks` executes."""
  return 0.0 if group_N is None else 2.0 * group_N.size * stacked.size


def one_by_one(
  of_group: Callable[[Array, int], Array], groups: int, x_NxPxI: Array, group_N: Array | None
) -> Array:
  """Each block of rows through `of_group(x, group)`, one after the other: no matrix is copied.

  Args:
    groups: how many there are.
    group_N: as in `grouped_matmul`.
  """
  if group_N is None:
    return jnp.stack([of_group(x_PxI, group) for group, x_PxI in enumerate(x_NxPxI)])
  branches = [lambda x_PxI, group=group: of_group(x_PxI, group) for group in range(groups)]
  shape = jax.eval_shape(branches[0], x_NxPxI[0])
  branches += [lambda x_PxI: jnp.zeros(shape.shape, shape.dtype)]
  run = lambda block: jax.lax.switch(block[0], branches, block[1])  # noqa: E731
  if x_NxPxI.shape[1] == 1 and len(x_NxPxI) * groups <= UNROLLED:
    # Of one token, few: a loop would cost more than what it repeats.
    return jnp.stack([run(block) for block in zip(group_N, x_NxPxI)])
  return jax.lax.map(run, (group_N, x_NxPxI))
