"""ReLU."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod, Traits


class ReLU(LayerMethod):
  """Zeroes what is negative: `max(x, 0)`."""

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Nair and Hinton 2010', saves='nothing that is claimed; its zeros are observed'
    )

  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """`[..., F]` to `[..., F]`."""
    return nn.relu(h)
