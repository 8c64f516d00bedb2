"""Mean squared inputs."""

import jax.numpy as jnp

from sparse_lm.core.signal import Array, CalibrationSignal


class XSq(CalibrationSignal):
  """The mean square of each input of a kernel, float32 `[in]`."""

  def of_inputs(self, x_NxI: Array) -> Array:
    """Squares summed over the tokens."""
    return jnp.sum(jnp.square(x_NxI), axis=0)
