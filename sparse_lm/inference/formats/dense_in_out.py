"""All weights, input by input, of kernels with few inputs and many outputs."""

from typing import ClassVar

import numpy as np

from sparse_lm.core.format import InputMajor

MOST_INPUTS = 511


class DenseInOut(InputMajor):
  """The kernel `[in, out]` as it is: one token multiplies long rows, not many short ones.

  On a CPU a product with one token then takes 0.6 to 0.8 of the time of `dense_out_in`, and from 768
  inputs on none is saved.
  """

  plain: ClassVar[bool] = True

  @classmethod
  def misfit(cls, mask: np.ndarray) -> str:
    """Kernels of many inputs, or of few outputs."""
    inputs, outputs = mask.shape
    fits = inputs <= MOST_INPUTS and outputs >= 2 * inputs
    return '' if fits else f'not {MOST_INPUTS} inputs or less and twice as many outputs'
