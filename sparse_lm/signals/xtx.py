"""The Gram matrix of a kernel's inputs."""

from sparse_lm.core.signal import Array, CalibrationSignal


class XtX(CalibrationSignal):
  """The mean outer product of a kernel's inputs over tokens, float32 `[in, in]`."""

  def of_inputs(self, x_NxI: Array) -> Array:
    """Returns the outer products of the inputs, summed over the tokens."""
    return x_NxI.T @ x_NxI
