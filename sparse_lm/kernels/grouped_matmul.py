"""Grouped matmul: multiplies each block of rows by one of several stacked matrices.

`grouped_matmul` chooses the backend itself.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.kernels import device, expert_tiles

Array = jax.Array

# Above this number of branches, conditionals run in a loop to limit compilation time.
UNROLLED = 64

COPIED_BLOCK_ROWS = 64  # rows of a block if the matrix of each block is copied


def grouped_matmul(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None = None) -> Array:
  """Multiplies each block of rows by the matrix of its group: `[N, P, F]`.

  With one row per block (decoding), only the matrices of the given groups are read. On a recent NVIDIA
  GPU this holds for blocks of any size, and blocks without a group cost nothing. On other devices,
  matrices are copied for the blocks by a product with one-hot rows.

  Args:
    x_NxPxI: blocks of rows.
    kernel_ExIxF: the stacked matrices of any float dtype; they are cast to the dtype of the rows.
    group_N: int32, the group of each block, ascending if the result is differentiated; E means no group
      and gives zeros. `None` means that block i belongs to group i.
  """
  if _in_tiles(x_NxPxI, kernel_ExIxF, group_N):
    padded = jnp.pad(x_NxPxI, ((0, 0), (0, _empty_rows(x_NxPxI)), (0, 0)))
    y_NxPxF = expert_tiles.product(padded, kernel_ExIxF.astype(x_NxPxI.dtype), group_N)
    return y_NxPxF[:, : x_NxPxI.shape[1]]
  if group_N is not None and x_NxPxI.shape[1] == 1:
    of_group = lambda x, group: x @ kernel_ExIxF[group].astype(x.dtype)  # noqa: E731
    return one_by_one(of_group, len(kernel_ExIxF), x_NxPxI, group_N)
  kernel_NxIxF = gather_groups(kernel_ExIxF.astype(x_NxPxI.dtype), group_N)
  return jnp.einsum('npi,nif->npf', x_NxPxI, kernel_NxIxF)


def copied_flops(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None = None) -> float:
  """Returns the FLOPs that `grouped_matmul` executes on this device beyond the products of the rows."""
  if _in_tiles(x_NxPxI, kernel_ExIxF, group_N):
    return 2.0 * len(x_NxPxI) * _empty_rows(x_NxPxI) * math.prod(kernel_ExIxF.shape[1:])
  if group_N is not None and x_NxPxI.shape[1] == 1:
    return 0.0
  return selection_flops(kernel_ExIxF, group_N)


def block_rows(shape: tuple[int, int, int]) -> int:
  """Returns the number of rows per block that suits this device, for stacked matrices `(E, I, F)`."""
  in_tiles = has_tiles() and expert_tiles.fits(expert_tiles.ROWS, shape, 1)
  return expert_tiles.ROWS if in_tiles else COPIED_BLOCK_ROWS


def has_tiles() -> bool:
  """Returns whether this device runs the kernels of `expert_tiles`: NVIDIA GPUs since the A100."""
  return device.is_recent_gpu()


def _in_tiles(x_NxPxI: Array, kernel_ExIxF: Array, group_N: Array | None) -> bool:
  """Returns whether the kernels of `expert_tiles` run this call."""
  if group_N is None or not has_tiles():
    return False
  rows = x_NxPxI.shape[1] + _empty_rows(x_NxPxI)
  return expert_tiles.fits(rows, kernel_ExIxF.shape, len(x_NxPxI))


def _empty_rows(x_NxPxI: Array) -> int:
  """Returns the number of zero rows that pad a block of one row to a tile."""
  return expert_tiles.SIZES[-1] - 1 if x_NxPxI.shape[1] == 1 else 0


def gather_groups(stacked: Array, group_N: Array | None) -> Array:
  """Returns the entry of a stack `[E, ...]` for each block's group: `[N, ...]`; zeros for group E.

  This is a product with one-hot rows, whose gradient is again a product. The gradient of indexing would
  be a scatter-add.
  """
  if group_N is None:
    return stacked
  chosen = jax.nn.one_hot(group_N, len(stacked), dtype=stacked.dtype)
  flat = chosen @ stacked.reshape(len(stacked), -1)
  return flat.reshape(-1, *stacked.shape[1:])


def selection_flops(stacked: Array, group_N: Array | None) -> float:
  """Returns the FLOPs that `gather_groups` executes."""
  return 0.0 if group_N is None else 2.0 * group_N.size * stacked.size


def one_by_one(
  of_group: Callable[[Array, int], Array], groups: int, x_NxPxI: Array, group_N: Array | None
) -> Array:
  """Applies `of_group(x, group)` to one block of rows after the other, without copies of matrices.

  Args:
    of_group: the function; `group` is a Python int.
    groups: number of groups.
    x_NxPxI: blocks of rows.
    group_N: as in `grouped_matmul`.
  """
  if group_N is None:
    return jnp.stack([of_group(x_PxI, group) for group, x_PxI in enumerate(x_NxPxI)])
  branches = [lambda x_PxI, group=group: of_group(x_PxI, group) for group in range(groups)]
  shape = jax.eval_shape(branches[0], x_NxPxI[0])
  branches += [lambda x_PxI: jnp.zeros(shape.shape, shape.dtype)]
  run = lambda block: jax.lax.switch(block[0], branches, block[1])  # noqa: E731
  if x_NxPxI.shape[1] == 1 and len(x_NxPxI) * groups <= UNROLLED:
    # For a few blocks of one row, a loop would cost more than its body.
    return jnp.stack([run(block) for block in zip(group_N, x_NxPxI)])
  return jax.lax.map(run, (group_N, x_NxPxI))
