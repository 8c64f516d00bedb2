"""Distillation: training on a teacher's logits in addition to the text (Hinton et al. 2015)."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Distillation:
  """The fields of `config.distill` except the teacher.

  The loss is `(1 - weight) CE + weight temperature^2 KL(teacher || model)`. As in the paper, the factor
  temperature^2 keeps the gradients' scale independent of the temperature.
  """

  weight: float
  temperature: float

  @classmethod
  def from_config(cls, config: ConfigDict) -> 'Distillation | None':
    """Reads `config.distill`; returns `None` without a teacher."""
    weight, temperature = config.distill.weight, config.distill.temperature
    return cls(weight, temperature) if config.distill.teacher else None
