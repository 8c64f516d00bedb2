"""The base class of arrays over the tokens of sequences, with their positions and validity."""

import dataclasses
from typing import Self

import jax
import numpy as np

Array = jax.Array


class Placed:
  """The base class of dataclasses with at least the fields below.

  Attributes:
    positions: int32 `[B, L]`, the position of each token in its sequence.
    valid: bool `[B, L]`, whether the token may be read.
    whole: whether all sequences are known, already during tracing, to be complete and in order: positions
      are 0 to L - 1, and all tokens are valid. Kernels then need no mask array. If the arrays have values
      that contradict this, the constructor raises a `ValueError`.
  """

  positions: Array
  valid: Array
  whole: bool

  def __post_init__(self) -> None:
    known = all(
      isinstance(a, np.ndarray | jax.Array) and not isinstance(a, jax.core.Tracer)
      for a in (self.positions, self.valid)
    )
    if not self.whole or not known:
      return
    positions, valid = np.asarray(self.positions), np.asarray(self.valid)
    if (positions != np.arange(positions.shape[-1])).any() or not valid.all():
      raise ValueError(
        f'whole sequences have positions 0, 1, 2, ... and only valid tokens; got positions '
        f'{positions.tolist()}, valid {valid.tolist()}'
      )

  def replace(self, **fields: Array) -> Self:
    """Replaces fields, as `dataclasses.replace`; new `positions` or `valid` set `whole` to false."""
    same = all(fields.get(name, own) is own for name, own in self._places.items())
    return dataclasses.replace(self, **{'whole': self.whole and same} | fields)

  @property
  def _places(self) -> dict[str, Array]:
    return {'positions': self.positions, 'valid': self.valid}
