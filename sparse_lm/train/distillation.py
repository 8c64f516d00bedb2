"""Learning from a teacher's logits besides the text (Hinton et al. 2015)."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Distillation:
  """`config.distill` without the teacher: `(1 - weight) CE + weight temperature^2 KL(teacher || model)`.

  The square of the temperature keeps the size of the gradients, as in the paper.
  """

  weight: float
  temperature: float

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'Distillation | None':
    """Reads `config.distill`; `None` without a teacher."""
    weight, temperature = config.distill.weight, config.distill.temperature
    return cls(weight, temperature) if config.distill.teacher else None
