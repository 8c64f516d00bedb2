"""Running a layer on some tokens only."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def gather_run_scatter(
  block: nn.Module,
  x_BxLxD: jax.Array,
  positions_BxL: jax.Array,
  valid_BxL: jax.Array,
  index_BxC: jax.Array,
  mode: str,
) -> jax.Array:
  """What the block adds, `[B, L, D]`, to the valid ones of the tokens at `index`; zeros elsewhere."""

  def take(a: jax.Array) -> jax.Array:
    return jnp.take_along_axis(a, index_BxC.reshape(*index_BxC.shape, *[1] * (a.ndim - 2)), axis=1)

  taken_BxC = take(valid_BxL)
  added_BxCxD = block(take(x_BxLxD), take(positions_BxL), taken_BxC, mode)
  added_BxCxD = jnp.where(taken_BxC[..., None], added_BxCxD, 0)
  row = jnp.arange(x_BxLxD.shape[0])[:, None]
  return jnp.zeros_like(x_BxLxD).at[row, index_BxC].set(added_BxCxD.astype(x_BxLxD.dtype))


def run_routed(
  block: nn.Module,
  x_BxLxD: jax.Array,
  positions_BxL: jax.Array,
  enters_BxL: jax.Array,
  mode: str,
) -> jax.Array:
  """What the block adds, `[B, L, D]`, to the tokens that enter.

  Decoding runs it for as many tokens of each sequence as enter, rounded up to a half, a quarter, ...
  of them, or not at all, and gives zeros to the others. In other modes it runs for all of them, and
  what it gives to the others is to be dropped.
  """
  if mode != 'decode' or block.is_initializing():
    return block(x_BxLxD, positions_BxL, enters_BxL, mode)
  sizes = _sizes(x_BxLxD.shape[1])
  most = jnp.max(jnp.sum(enters_BxL, axis=1))
  branch = jnp.searchsorted(jnp.array([0, *sizes]), most)
  branches = [lambda block, x, positions, enters: jnp.zeros_like(x)]
  branches += [_of_size(size, mode) for size in sizes]
  return nn.switch(branch, branches, block, x_BxLxD, positions_BxL, enters_BxL)


def _sizes(length: int) -> list[int]:
  """`length` and its halves, down to a sixteenth."""
  return sorted({-(-length // 2**i) for i in range(5)})


def _of_size(size: int, mode: str):
  def run(block, x_BxLxD, positions_BxL, enters_BxL):
    if size == x_BxLxD.shape[1]:
      added = block(x_BxLxD, positions_BxL, enters_BxL, mode)
      return jnp.where(enters_BxL[..., None], added, 0).astype(x_BxLxD.dtype)
    index_BxC = jnp.argsort(~enters_BxL, axis=1, stable=True)[:, :size]  # in order of position
    return gather_run_scatter(block, x_BxLxD, positions_BxL, enters_BxL, index_BxC, mode)

  return run
