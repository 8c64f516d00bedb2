"""The gradient of the loss, for dropped weights too."""

from sparse_lm.core.signal import Array, TrainingSignal


class Grads(TrainingSignal):
  """The gradient of the loss in the step of the update, for dropped weights too."""

  def of_gradient(self, weights: Array, gradient: Array) -> Array:
    """Returns the gradient."""
    return gradient
