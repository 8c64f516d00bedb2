"""The gated MLP (GLU variants)."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import selects, up_and_down
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
    if selects(activation):
      return self._selected(activation, x_BxLxD, mode)
    units = {'gate': self.spec.hidden, 'up': self.spec.hidden}
    gate_BxLxF, up_BxLxF = fused_projections(self, self.spec, x_BxLxD, units)
    h_BxLxF = record.site(self, 'hidden', activation(gate_BxLxF, mode) * up_BxLxF)
    with observe_hidden_units(self, activation, h_BxLxF, mode):
      down = Linear(self.spec, self.spec.width, role='out', name='down')
      return down(h_BxLxF)

  def _selected(self, activation: LayerMethod, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Does the same with an activation that selects units, of which alone `up` and `down` are needed."""
    spec = self.spec
    gate_BxLxF = activation(Linear(spec, spec.hidden, name='gate')(x_BxLxD), mode)
    up = Linear(spec, spec.hidden, name='up')
    down = Linear(spec, spec.width, role='out', name='down')
    gating = activation.traits.gating
    if not record.wanted(self, 'hidden'):
      chosen_BxLxF = gate_BxLxF != 0
      y = up_and_down(up, down, x_BxLxD, gate_BxLxF, chosen_BxLxF, gating.planned, mode)
      if y is not None:
        return y
    with record.gated(activation.path, gating):
      h_BxLxF = record.site(self, 'hidden', gate_BxLxF * up(x_BxLxD))
      with observe_hidden_units(self, None, h_BxLxF, mode):
        return down(h_BxLxF)
