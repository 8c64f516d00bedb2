"""The tokens that a layer sees, with what it has to know of each of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.kernels.placed import Placed
from sparse_lm.kernels.rows import places_of, take_rows_of_each
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
    """The tokens at int32 `[B, C]` of each sequence, none of them twice."""
    place_BxL = places_of(index_BxC, self.x.shape[1])
    at = {'x': take_rows_of_each(self.x, index_BxC, place_BxL)}
    for name in ('positions', 'valid'):
      at[name] = jnp.take_along_axis(self._places[name], index_BxC, axis=1)
    return dataclasses.replace(self, whole=False, **at)
