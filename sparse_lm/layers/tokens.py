"""The input of a layer: tokens with their positions and validity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparse_lm.kernels.placed import Placed
from sparse_lm.kernels.rows import inverse_index, take_rows_of_each
from sparse_lm.layers.progress import Progress


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('x', 'positions', 'valid', 'progress'),
  meta_fields=('continues', 'whole'),
)
@dataclasses.dataclass(frozen=True)
class Tokens(Placed):
  """The tokens of a batch of sequences: all of them, or only those that enter a layer.

  Attributes:
    x: `[B, L, D]`, the residual stream, raw or normalised.
    positions: int32 `[B, L]`, the position of each token in its sequence. A token keeps its position if
      other tokens are left out.
    valid: bool `[B, L]`, whether other tokens may read the token.
    continues: whether the tokens continue the sequences in the cache. A single token always does; several
      tokens begin a new sequence unless this is true.
    whole: whether the tokens are known to be all tokens of each sequence, in order (`kernels/placed.py`).
    progress: training progress, for modules with a schedule; `None` outside of training.
  """

  x: jax.Array
  positions: jax.Array
  valid: jax.Array
  continues: bool = False
  whole: bool = False
  progress: Progress | None = None

  def only(self, chosen_BxL: jax.Array) -> 'Tokens':
    """Returns the tokens with those that are not chosen (bool `[B, L or 1]`) marked as not valid."""
    return self.replace(valid=self.valid & chosen_BxL)

  def take(self, index_BxC: jax.Array) -> 'Tokens':
    """Returns the tokens at the indices of each sequence, int32 `[B, C]` without repeats."""
    place_BxL = inverse_index(index_BxC, self.x.shape[1])
    at = {'x': take_rows_of_each(self.x, index_BxC, place_BxL)}
    for name in ('positions', 'valid'):
      at[name] = jnp.take_along_axis(self._places[name], index_BxC, axis=1)
    return dataclasses.replace(self, whole=False, **at)
