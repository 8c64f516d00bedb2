"""Base classes of signals: statistics that a weight method reads besides the weights.

Each signal is one file in `sparse_lm/signals/`. A weight method names the signals that it needs in its
traits. A signal is computed in training steps or on calibration text.
"""

import abc
from typing import ClassVar

import jax

Array = jax.Array


class TrainingSignal(abc.ABC):
  """The base class of signals that are computed in training steps.

  They are functions of the gradient of the loss at the effective (masked) weights. This gradient is also
  nonzero at dropped weights.

  Attributes:
    batches: number of optimizer steps that a mask update averages the signal over: its own step and the
      steps before it. It averages over fewer steps if the previous mask update or the start of the run is
      closer. One-shot pruning averages over all calibration batches instead.
  """

  batches: ClassVar[int] = 1

  @abc.abstractmethod
  def of_gradient(self, weights: Array, gradient: Array) -> Array:
    """Returns the signal of one optimizer step for one parameter.

    Args:
      weights: the effective weights, with zeros where a weight is dropped.
      gradient: gradient of the loss at `weights`, averaged over the step's microbatches.

    Returns:
      An array of the same shape as `weights`.
    """


class CalibrationSignal(abc.ABC):
  """The base class of signals that are computed from a kernel's inputs on calibration text.

  The signal is the mean over all tokens that reach the kernel.
  """

  @abc.abstractmethod
  def of_inputs(self, x_NxI: Array) -> Array:
    """Returns the sum of the signal over N tokens, an array of any shape.

    Args:
      x_NxI: float32, the inputs of a kernel `[I, out]`; tokens that skip the kernel are rows of zeros.
    """


Signal = TrainingSignal | CalibrationSignal
