"""The plain two-matrix MLP."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import project, selects
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import hidden_units
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Dense(LayerMethod):
  """`down(activation(up(x)))`.


  Attributes:
    activation: makes the activation slot's module.
  """

  spec: Spec
  activation: Callable[[], nn.Module]

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='Vaswani et al. 2017', saves='nothing')

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    activation = self.activation()
    axes = {'up/kernel': -1, 'down/kernel': -2}
    record.units(self.path, 'neuron', self.spec.hidden, axes, dynamic=selects(activation))
    h_BxLxF = Linear(self.spec, self.spec.hidden, name='up')(x_BxLxD)
    h_BxLxF = record.site(self, 'hidden', activation(h_BxLxF, mode))
    with hidden_units(self, activation, h_BxLxF, mode):
      down = Linear(self.spec, self.spec.width, role='out', name='down')
      return project(down, h_BxLxF, activation, mode)
