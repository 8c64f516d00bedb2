"""ReLU."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits

DISPLAY_NAME = 'ReLU'


class ReLU(LayerMethod):
  """ReLU: `max(x, 0)`."""

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='Nair and Hinton 2010', saves='nothing; zeros are only logged')

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Maps `[..., F]` to `[..., F]`."""
    return nn.relu(h)
