"""Signals: what a weight method may read besides the weights.

The signals themselves are one file each in `sparse_lm/signals/`; a weight method names those that it
needs in its traits. A signal comes from training steps or from calibration text.
"""

import abc
from typing import ClassVar

import jax

Array = jax.Array


class TrainingSignal(abc.ABC):
  """The base class of signals that come from training steps.

  They are read from the gradient at the parameters that the model sees. It reaches dropped weights too.

  Attributes:
    batches: an update of the masks reads the mean over so many optimizer steps, its own and those before
      it; over fewer where the update before, or the start of the run, is closer. One-shot pruning takes
      the mean over all batches of calibration text instead.
  """

  batches: ClassVar[int] = 1

  @abc.abstractmethod
  def of_gradient(self, weights: Array, gradient: Array) -> Array:
    """The signal of one optimizer step for one parameter.

    Args:
      weights: of any shape, as the model saw them, with zeros where a weight is dropped.
      gradient: of the loss at `weights`, of their shape, averaged over the step's microbatches.

    Returns:
      An array of the same shape.
    """


class CalibrationSignal(abc.ABC):
  """The base class of signals that come from what a trained model's kernels read on calibration text.

  The signal is the mean over all tokens that reach a kernel.
  """

  @abc.abstractmethod
  def of_inputs(self, x_NxI: Array) -> Array:
    """The sum of the signal over N tokens, an array of any shape.

    Args:
      x_NxI: float32, what a kernel `[I, out]` reads; zeros stand for tokens that skip it.
    """


Signal = TrainingSignal | CalibrationSignal
