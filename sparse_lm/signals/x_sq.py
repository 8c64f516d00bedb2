"""Mean squared inputs."""

import jax.numpy as jnp

from sparse_lm.core.signal import Array, CalibrationSignal


class XSq(CalibrationSignal):
  """The mean of the squared inputs of a kernel over tokens, float32 `[in]`."""

  def of_inputs(self, x_NxI: Array) -> Array:
    """Returns the squared inputs, summed over the tokens."""
    return jnp.sum(jnp.square(x_NxI), axis=0)
