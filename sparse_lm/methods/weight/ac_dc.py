"""AC/DC: dense and sparse phases in turn."""

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


@dataclasses.dataclass(frozen=True)
class ACDC(PatternMethod):
  """Trains in turn with all weights and with the largest alone, and ends with the largest.

  A compression keeps the units of the largest mean magnitude. When masks open again, what was dropped
  starts at zero, with moments and averages of zero. The defaults are the fractions of the paper's 100
  epochs of ResNet-50: dense until 0.1; from then on sparse and dense phases of 0.05; dense from 0.75
  and sparse from 0.85 to the end.

  Differs from the paper: at an opening the momentum of the weights that were kept goes on.

  A run of few steps leaves out phases that have no step. Its first step is always dense, and it ends
  sparse even if it has one step.

  Attributes:
    start: of the first sparse phase, a fraction of the run.
    phase: length of the phases in turn, a fraction of the run.
    last_dense: least length of the last dense phase, which ends at `end`, a fraction of the run.
    end: of the last dense phase, a fraction of the run.
  """

  start: float = ranged(0.1, '[0, 1]')
  phase: float = ranged(0.05, '[0.001, 1]')
  last_dense: float = ranged(0.1, '[0, 1]')
  end: float = ranged(0.85, '[0, 1]')
  traits: ClassVar[Traits] = Traits(
    paper='AC/DC: Alternating Compressed/DeCompressed Training (Peste et al. 2021), algorithm 1',
    saves='weights, gradients and moments of dropped connections in sparse phases; nothing in dense ones',
  )

  def check(self) -> None:
    """Raises UserError for an end before the start, or units that could not grow from zero."""
    require(
      self.start <= self.end,
      'config.weight.end',
      self.end,
      f'config.weight.start={self.start} or more',
    )
    self.check_growth()

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Starts from masks that keep every weight."""
    return {'params': params, 'learned': {}}, Sparse(full_masks(params, target), target)

  def due(self, step: int) -> bool:
    """Where the next step is of another phase than this one, and where the run ends.

    A run that is continued for another length keeps its masks until its new schedule changes phase. The
    last step drops what is left to drop.
    """
    ends = step + 1 == self.total_steps
    return ends or bool(self._is_sparse(step) != self._is_sparse(step + 1))

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Keeps the largest units where the next step is of a sparse phase, and all units where it is not."""
    params = restrict_to(trainable['params'], sparse.masks)
    largest = self.units.masks(jax.tree.map(jnp.abs, params), sparse.target)
    opens = ~self._is_sparse(step + 1)
    return exchange_masks(trainable, sparse, jax.tree.map(lambda mask: mask | opens, largest))

  def density(self, target: float, step: int) -> float:
    """The final density in sparse phases, 1 in dense ones."""
    return target if self._is_sparse(step) else 1.0

  @functools.cached_property
  def _switches(self) -> np.ndarray:
    """The steps at which sparse and dense phases begin in turn, a sparse one first and last."""
    dense_from = self.end - self.last_dense
    alternating = max(0, math.ceil((dense_from - self.start) / self.phase))
    begins = [self.start + self.phase * n for n in range(alternating)]
    begins += [dense_from] * (alternating % 2) + [self.end]
    # 0.1 + 7 * 0.05 is a little more than 0.45.
    return np.array([round(round(share, 9) * self.total_steps) for share in begins])

  def _is_sparse(self, step: Array | int) -> Array | np.bool_:
    """Whether `step` is of a sparse phase; the run ends before step `total_steps`."""
    begun = (self._switches <= step).sum()
    return (begun % 2 == 1) & (step > 0)
