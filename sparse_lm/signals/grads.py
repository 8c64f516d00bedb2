"""The dense gradient."""

from sparse_lm.core.signal import Array, TrainingSignal


class Grads(TrainingSignal):
  """The gradient of the loss, of dropped weights too, in the step of the update alone."""

  def of_gradient(self, weights: Array, gradient: Array) -> Array:
    """The gradient as it is."""
    return gradient
