"""AC/DC: alternating sparse and dense phases."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import (
  Array,
  MaskUpdate,
  PatternMethod,
  Sparse,
  exchange_masks,
  full_masks,
  restrict_to,
)
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'AC/DC'


@dataclasses.dataclass(frozen=True)
class ACDC(PatternMethod):
  """Alternates between training all weights and training only the largest, and ends sparse.

  At the start of a sparse phase the units of largest mean magnitude are kept. At the start of a dense
  phase the dropped weights begin at zero, and so do their moments and averages. The defaults are the
  fractions of the paper's 100 epochs of ResNet-50: dense until 0.1 of the run; then sparse and dense
  phases of 0.05 each; dense from 0.75 to 0.85; and sparse to the end.

  Differs from the paper: the momentum of kept weights is not reset at the start of a dense phase.

  In a run of few steps, phases that are shorter than a step are left out. The first step is always dense,
  and the run always ends sparse.

  Attributes:
    start: start of the first sparse phase, as a fraction of the run.
    phase: length of the alternating phases, as a fraction of the run.
    last_dense: minimum length of the last dense phase, as a fraction of the run.
    end: end of the last dense phase, as a fraction of the run.
  """

  start: float = ranged(0.1, '[0, 1]')
  phase: float = ranged(0.05, '[0.001, 1]')
  last_dense: float = ranged(0.1, '[0, 1]')
  end: float = ranged(0.85, '[0, 1]')
  traits: ClassVar[Traits] = Traits(
    paper='AC/DC: Alternating Compressed/DeCompressed Training (Peste et al. 2021), algorithm 1',
    saves='weights, gradients and moments of dropped weights in sparse phases; nothing in dense ones',
  )

  def check(self) -> None:
    """Raises UserError if `end` is before `start`, or if the pattern's units cannot grow from zero."""
    require(
      self.start <= self.end,
      'config.weight.end',
      self.end,
      f'config.weight.start={self.start} or more',
    )
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts with masks that keep every weight."""
    return {'params': params, 'learned': {}}, Sparse(full_masks(params, target), target)

  def due(self, step: int) -> bool:
    """True if the next step belongs to another phase, and at the last step of the run.

    A run that is continued with more steps keeps its masks until its new schedule changes the phase. The
    last step makes the masks sparse if they are not.
    """
    ends = step + 1 == self.total_steps
    return ends or bool(self._is_sparse(step) != self._is_sparse(step + 1))

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest units if the next step belongs to a sparse phase, and all units otherwise."""
    params = restrict_to(trainable['params'], sparse.masks)
    largest = self.units.masks(jax.tree.map(jnp.abs, params), sparse.target)
    opens = ~self._is_sparse(step + 1)
    return exchange_masks(trainable, sparse, jax.tree.map(lambda mask: mask | opens, largest))

  def density(self, target: float, step: int) -> float:
    """The final density in sparse phases, 1 in dense phases."""
    return target if self._is_sparse(step) else 1.0

  @functools.cached_property
  def _switches(self) -> np.ndarray:
    """The first steps of alternating sparse and dense phases; the first and the last phase are sparse."""
    dense_from = self.end - self.last_dense
    alternating = max(0, math.ceil((dense_from - self.start) / self.phase))
    begins = [self.start + self.phase * n for n in range(alternating)]
    begins += [dense_from] * (alternating % 2) + [self.end]
    # 0.1 + 7 * 0.05 is a little more than 0.45.
    return np.array([round(round(share, 9) * self.total_steps) for share in begins])

  def _is_sparse(self, step: Array | int) -> Array | np.bool_:
    """True if `step` belongs to a sparse phase; the last step of a run is `total_steps` - 1."""
    begun = (self._switches <= step).sum()
    return (begun % 2 == 1) & (step > 0)
