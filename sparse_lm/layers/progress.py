"""Where training stands, for what changes while a model is trained."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Progress:
  """The place of an optimizer step in a run.

  Attributes:
    step: int32, optimizer steps completed; all microbatches of a step have the same.
    steps: of the whole run.
  """

  step: jax.Array
  steps: int = struct.field(pytree_node=False)

  @property
  def fraction(self) -> jax.Array:
    """From 0 at the first step to 1 at the last one, float32."""
    return self.step.astype(jnp.float32) / max(self.steps - 1, 1)
