"""Runs a layer on a subset of the tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.rows import inverse_index, take_rows_of_each
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record


def gather_run_scatter(
  block: nn.Module, tokens: Tokens, index_BxC: jax.Array, mode: str
) -> jax.Array:
  """Runs the block on the valid tokens at `index_BxC`; returns its output `[B, L, D]`, zero elsewhere.

  Outputs return to their places by a gather, too. `index_BxC` must not repeat a token of a sequence.
  """
  taken = tokens.take(index_BxC)
  added_BxCxD = jnp.where(taken.valid[..., None], block(taken, mode), 0)
  place_BxL = inverse_index(index_BxC, tokens.x.shape[1])
  return take_rows_of_each(added_BxCxD.astype(tokens.x.dtype), place_BxL, index_BxC)


def run_routed(block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
  """Runs the block on the valid tokens; returns its output `[B, L, D]`.

  Decoding computes only the valid tokens. Their number is rounded up to all, a half, a quarter, ... of
  the tokens, or is zero, and other tokens get zeros. Other modes compute all tokens, and the caller
  must drop the outputs of tokens that are not valid.
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
  """Returns `length`, a half, a quarter, an eighth and a sixteenth of it, rounded up."""
  return sorted({-(-length // 2**i) for i in range(5)})


def _of_size(size: int, mode: str) -> Callable[[nn.Module, Tokens], jax.Array]:
  def run(block: nn.Module, tokens: Tokens) -> jax.Array:
    if size == tokens.x.shape[1]:
      added = block(tokens, mode)
      return jnp.where(tokens.valid[..., None], added, 0).astype(tokens.x.dtype)
    index_BxC = jnp.argsort(~tokens.valid, axis=1, stable=True)[:, :size]  # in order of position
    return gather_run_scatter(block, tokens, index_BxC, mode)

  return run
