"""Learning from a teacher's logits besides the text (Hinton et al. 2015)."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array


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

  def divergence(self, logits_BxLxV: Array, teacher_BxLxV: Array) -> Array:
    """KL in nats a token between the softened distributions, times the temperature's square."""
    ours, theirs = (
      jax.nn.log_softmax(logits / self.temperature) for logits in (logits_BxLxV, teacher_BxLxV)
    )
    return self.temperature**2 * jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))
