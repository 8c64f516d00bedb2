"""RigL: drops the smallest weights and grows weights of large gradient."""

import dataclasses
from typing import ClassVar

from sparse_lm.core import schedule
from sparse_lm.core.units import Array, Units
from sparse_lm.weights.rewire import Rewiring
from sparse_lm.weights.traits import Traits

DISPLAY_NAME = 'RigL'


@dataclasses.dataclass(frozen=True)
class RigL(Rewiring):
  """Drops the weights of smallest magnitude and grows as many of largest gradient; the share decays.

  The gradient of the loss at the masked weights is computed for all weights and averaged over the step's
  microbatches. As in the paper, a mask update replaces the optimizer step (the optimizer's step
  count, which sets the learning rate, does not advance); a weight that is dropped and grown in the same
  update keeps its value; and other grown weights start at zero, with zeroed moments.
  """

  traits: ClassVar[Traits] = Traits(
    paper='Rigging the Lottery (Evci et al. 2020), algorithm 1',
    saves='weights and moments of dropped weights; gradients except in steps that update masks',
    needs=('grads',),
    replaces_step=True,
  )

  def growth(self, signals: dict[str, Units], noise: Units) -> Units:
    """The magnitude of the gradient."""
    return signals['grads']

  def fraction(self, step: Array) -> Array:
    """Returns the fraction to replace: half a cosine from `drop_fraction` at step 0 to zero at `end`."""
    return schedule.cosine_fraction(step, self._last, self.drop_fraction)
