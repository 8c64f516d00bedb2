"""The plain two-matrix MLP."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.feed_forward import feed_forward
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec


class Dense(LayerMethod):
  """Computes `down(activation(up(x)))`.

  Attributes:
    activation: creates the module of the activation slot.
  """

  spec: Spec
  activation: Callable[[], nn.Module]

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='Vaswani et al. 2017', saves='nothing')

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Maps `[B, L, D]` to `[B, L, D]`."""
    return feed_forward(self, self.spec, self.activation, self.spec.hidden, x_BxLxD, mode)
