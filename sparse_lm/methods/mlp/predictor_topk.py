"""Hidden units that a cheap predictor selects before the up-projection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require, unknown
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import gaussian_threshold, topk_rows
from sparse_lm.layers.active import up_and_down
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import observe_hidden_units, sow_selected
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'predictor top-k'

SELECTORS = ('statistical', 'exact')


class PredictorTopK(LayerMethod):
  """A part of the inputs predicts which hidden units are active; the other part computes these units.

  It computes `down(activation(top-k(predictor(x[:r]))) * up(x[r:]))` and has as many weights as the plain
  MLP.

  Differs from the paper: the activation is that of the activation slot instead of GELU.

  Attributes:
    activation: creates the module of the activation slot.
    density: fraction of the units that is active.
    split: fraction of the inputs that the predictor reads.
    selector: 'statistical' (a Gaussian threshold, see `statistical_topk`) or 'exact'.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  density: float = ranged(0.125, '(0, 1]')
  split: float = ranged(0.5, '(0, 1)')
  selector: str = 'statistical'

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Spark (You et al. 2025)',
      saves='the up- and the down-projection of the other units (the predictor runs in full)',
      twin='dense',
      gating=Gating(planned=self.density),
    )

  def check(self) -> None:
    """Raises UserError for an unknown selector, or if `split` leaves one part without inputs."""
    if self.selector not in SELECTORS:
      raise unknown('config.mlp.selector', self.selector, SELECTORS)
    width = self.spec.width
    valid = f'a fraction that leaves each side one of the {width} inputs at least'
    require(1 <= round(self.split * width) < width, 'config.mlp.split', self.split, valid)

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Maps `[B, L, D]` to `[B, L, D]`."""
    spec, r = self.spec, round(self.split * x_BxLxD.shape[-1])
    activation = self.activation()
    axes = {'predictor/kernel': -1, 'up/kernel': -1, 'down/kernel': -2}
    record.units(self.path, 'neuron', spec.hidden, axes, dynamic=self.density < 1)
    score_BxLxF = Linear(spec, spec.hidden, name='predictor')(x_BxLxD[..., :r])
    gate_BxLxF, chosen_BxLxF = self._select(activation, score_BxLxF, mode)
    sow_selected(self, chosen_BxLxF, mode)
    up = Linear(spec, spec.hidden, name='up')
    down = Linear(spec, spec.width, role='out', name='down')
    read_BxLxD = x_BxLxD[..., r:]
    gathered = up_and_down(up, down, read_BxLxD, gate_BxLxF, chosen_BxLxF, self.density, mode)
    if gathered is not None:
      return gathered
    with record.gated(self.path, self.traits.gating):
      h_BxLxF = record.site(self, 'hidden', gate_BxLxF * up(read_BxLxD))
      with observe_hidden_units(self, None, h_BxLxF, mode):
        return down(h_BxLxF)

  def _select(
    self, activation: LayerMethod, score_BxLxF: jax.Array, mode: str
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the activations of the selected units, zero elsewhere, and a mask of these units."""
    if self.density == 1:
      return activation(score_BxLxF, mode), jnp.ones(score_BxLxF.shape, bool)
    if self.selector == 'statistical':
      above = score_BxLxF - gaussian_threshold(score_BxLxF, self.density).astype(score_BxLxF.dtype)
      chosen = above > 0
      return jnp.where(chosen, activation(jnp.maximum(above, 0), mode), 0), chosen
    k = max(1, round(self.density * self.spec.hidden))
    chosen = topk_rows(jax.lax.stop_gradient(score_BxLxF), k)
    return jnp.where(chosen, activation(score_BxLxF, mode), 0), chosen
