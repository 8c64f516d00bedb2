"""The tokens that a layer sees, with what it has to know of each of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.kernels.placed import Placed
from sparse_lm.layers.progress import Progress


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('x', 'positions', 'valid', 'progress'),
  meta_fields=('continues', 'whole'),
)
@dataclasses.dataclass(frozen=True)
class Tokens(Placed):
  """Tokens of a batch of sequences: all of them, or those that enter a layer.

  Attributes:
    x: `[B, L, D]`, the residual stream, or what a norm made of it.
    positions: int32 `[B, L]`, the place of each token in its sequence. Where others are left out, a token
      keeps its own.
    valid: bool `[B, L]`, whether others may read the token.
    continues: whether tokens that a module caches go on behind those that it holds. A single token always
      does; several begin a sequence unless this is set.
    whole: whether these are known to be all tokens of each sequence, in order; see `kernels/placed.py`.
    progress: where training stands, for schedules of modules; `None` where nothing is trained.
  """

  x: jax.Array
  positions: jax.Array
  valid: jax.Array
  continues: bool = False
  whole: bool = False
  progress: Progress | None = None

  def only(self, chosen_BxL: jax.Array) -> 'Tokens':
    """The same tokens, of which those that are not chosen, bool `[B, L or 1]`, are not valid."""
    return self.replace(valid=self.valid & chosen_BxL)

  def take(self, index_BxC: jax.Array) -> 'Tokens':
    """The tokens at int32 `[B, C]` of each sequence."""

    def rows(a: jax.Array) -> jax.Array:
      index = index_BxC.reshape(*index_BxC.shape, *[1] * (a.ndim - 2))
      return jnp.take_along_axis(a, index, axis=1)

    at = {'x': rows(self.x), 'positions': rows(self.positions), 'valid': rows(self.valid)}
    return dataclasses.replace(self, whole=False, **at)
