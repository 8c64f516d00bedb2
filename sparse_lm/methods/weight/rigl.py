"""RigL: grow where the dense gradient is largest."""

import dataclasses
from typing import ClassVar

from sparse_lm.core import schedule
from sparse_lm.core.units import Array, Units
from sparse_lm.weights.rewire import Rewiring
from sparse_lm.weights.traits import Traits


@dataclasses.dataclass(frozen=True)
class RigL(Rewiring):
  """Drops the smallest connections and grows those with the largest gradient; the share decays.

  The gradient is the dense one at the masked weights, averaged over the step's microbatches. As in the
  paper the optimizer rests in a step that rewires (and so does its count, by which the rate decays), a
  dropped connection may be grown again and keeps its value, and born ones start at zero with zeroed
  moments.
  """

  traits: ClassVar[Traits] = Traits(
    paper='Rigging the Lottery (Evci et al. 2020), algorithm 1',
    saves='weights and moments of dropped connections; gradients but in steps that rewire',
    needs=('grads',),
    replaces_step=True,
  )

  def growth(self, signals: dict[str, Units], noise: Units) -> Units:
    """Grows by the magnitude of the dense gradient."""
    return signals['grads']

  def fraction(self, step: Array) -> Array:
    """The share falls from `drop_fraction` to zero at `end` along half a cosine."""
    return schedule.cosine_fraction(step, self._last, self.drop_fraction)
