"""The gated MLP (GLU variants)."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import project, selects
from sparse_lm.layers.linear import Linear, fused_projections
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import observe_hidden_units
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Gated(LayerMethod):
  """Computes `down(activation(gate(x)) * up(x))`; with SiLU it is SwiGLU.

  It has three matrices. For as many parameters as a plain MLP, set `config.model.hidden` to two thirds.

  Attributes:
    activation: creates the module of the activation slot.
  """

  spec: Spec
  activation: Callable[[], nn.Module]

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='GLU variants (Shazeer 2020)', saves='nothing')

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Maps `[B, L, D]` to `[B, L, D]`."""
    activation = self.activation()
    axes = {'gate/kernel': -1, 'up/kernel': -1, 'down/kernel': -2}
    record.units(self.path, 'neuron', self.spec.hidden, axes, dynamic=selects(activation))
    units = {'gate': self.spec.hidden, 'up': self.spec.hidden}
    gate_BxLxF, up_BxLxF = fused_projections(self, self.spec, x_BxLxD, units)
    h_BxLxF = record.site(self, 'hidden', activation(gate_BxLxF, mode) * up_BxLxF)
    with observe_hidden_units(self, activation, h_BxLxF, mode):
      down = Linear(self.spec, self.spec.width, role='out', name='down')
      return project(down, h_BxLxF, activation, mode)
