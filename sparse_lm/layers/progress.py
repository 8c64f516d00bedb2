"""Training progress, for modules with a schedule."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Progress:
  """The progress of a run.

  Attributes:
    step: int32, number of completed optimizer steps; equal for all microbatches of a step.
    steps: number of optimizer steps of the whole run.
  """

  step: jax.Array
  steps: int = struct.field(pytree_node=False)

  @property
  def fraction(self) -> jax.Array:
    """Fraction of the run: 0 at the first step, 1 at the last one; float32."""
    return self.step.astype(jnp.float32) / max(self.steps - 1, 1)
