"""Mean outer products of inputs: Gram matrices."""

from sparse_lm.core.signal import Array, CalibrationSignal


class XtX(CalibrationSignal):
  """The mean outer product of a kernel's inputs, float32 `[in, in]`."""

  def of_inputs(self, x_NxI: Array) -> Array:
    """Outer products summed over the tokens."""
    return x_NxI.T @ x_NxI
