"""Running a layer on some tokens only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.rows import places_of, take_rows_of_each
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


def gather_run_scatter(
  block: nn.Module, tokens: Tokens, index_BxC: jax.Array, mode: str
) -> jax.Array:
  """The block's addend `[B, L, D]` for the valid tokens at `index`; zeros for all other tokens.

  The way back is a gather too, in which each token reads its own row. `index` must not name a token of a
  sequence twice.
  """
  taken = tokens.take(index_BxC)
  added_BxCxD = jnp.where(taken.valid[..., None], block(taken, mode), 0)
  place_BxL = places_of(index_BxC, tokens.x.shape[1])
  return take_rows_of_each(added_BxCxD.astype(tokens.x.dtype), place_BxL, index_BxC)


def run_routed(block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
  """What the block adds, `[B, L, D]`, to the tokens that enter: those that are valid.

  Decoding runs it for as many tokens of each sequence as enter, rounded up to a half, a quarter, ...
  of them, or not at all, and gives zeros to the others. In other modes it runs for all of them, and
  what it gives to the others is to be dropped.
  """
  if mode != 'decode' or block.is_initializing():
    return block(tokens, mode)
  sizes = _sizes(tokens.x.shape[1])
  most = jnp.max(jnp.sum(tokens.valid, axis=1))
  branch = jnp.searchsorted(jnp.array([0, *sizes]), most)
  branches = [lambda block, tokens: jnp.zeros_like(tokens.x)]
  branches += [_of_size(size, mode) for size in sizes]
  with record.in_branch():
    return nn.switch(branch, branches, block, tokens)


def _sizes(length: int) -> list[int]:
  """`length` and its halves, down to a sixteenth."""
  return sorted({-(-length // 2**i) for i in range(5)})


def _of_size(size: int, mode: str) -> Callable[[nn.Module, Tokens], jax.Array]:
  def run(block: nn.Module, tokens: Tokens) -> jax.Array:
    if size == tokens.x.shape[1]:
      added = block(tokens, mode)
      return jnp.where(tokens.valid[..., None], added, 0).astype(tokens.x.dtype)
    index_BxC = jnp.argsort(~tokens.valid, axis=1, stable=True)[:, :size]  # in order of position
    return gather_run_scatter(block, tokens, index_BxC, mode)

  return run
