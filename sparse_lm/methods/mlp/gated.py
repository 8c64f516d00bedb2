"""The gated MLP: one half decides how much of the other passes."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import project, selects
from sparse_lm.layers.linear import Linear, fused_projections
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import hidden_units
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Gated(LayerMethod):
  """`down(activation(gate(x)) * up(x))`; SwiGLU with SiLU.

  Three matrices of `hidden` units; at equal parameters take two thirds of a plain MLP's `hidden`.


  Attributes:
    activation: makes the activation slot's module.
  """

  spec: Spec
  activation: Callable[[], nn.Module]

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='GLU variants (Shazeer 2020)', saves='nothing')

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    activation = self.activation()
    axes = {'gate/kernel': -1, 'up/kernel': -1, 'down/kernel': -2}
    record.units(self.path, 'neuron', self.spec.hidden, axes, dynamic=selects(activation))
    units = {'gate': self.spec.hidden, 'up': self.spec.hidden}
    gate_BxLxF, up_BxLxF = fused_projections(self, self.spec, x_BxLxD, units)
    h_BxLxF = record.site(self, 'hidden', activation(gate_BxLxF, mode) * up_BxLxF)
    with hidden_units(self, activation, h_BxLxF, mode):
      down = Linear(self.spec, self.spec.width, role='out', name='down')
      return project(down, h_BxLxF, activation, mode)
