"""What stands at places of sequences, and may be known to be there without a gap."""

import dataclasses
from typing import Self

import jax
import numpy as np

Array = jax.Array


class Placed:
  """The base of dataclasses with the fields below, which may have others.

  Attributes:
    positions: int32 `[B, L]`, the place of each entry in its sequence.
    valid: bool `[B, L]`, whether the entry may be read.
    whole: whether it is known in a trace, where arrays hold no values yet, that each sequence is there
      from its beginning and in order: positions are 0 to L - 1, and all entries are valid. Then a kernel
      needs no array of bools. Raises ValueError where the arrays hold values that say otherwise.
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
        f'whole sequences have positions 0, 1, 2, ..., all valid; got {positions.tolist()}, '
        f'valid {valid.tolist()}'
      )

  def replace(self, **fields: Array) -> Self:
    """The same with other fields; not known to be whole any more if positions or `valid` are others."""
    same = all(fields.get(name, own) is own for name, own in self._places.items())
    return dataclasses.replace(self, **{'whole': self.whole and same} | fields)

  @property
  def _places(self) -> dict[str, Array]:
    return {'positions': self.positions, 'valid': self.valid}
