"""Sets small hidden units to zero, below calibrated thresholds (CATS)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.layers import sow
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.threshold import below
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'CATS'


class Cats(LayerMethod):
  """Applies an inner activation, and sets results to zero if their magnitude is below a threshold.

  Each layer has one threshold. `python -m sparse_lm.prune` calibrates the thresholds on text, without
  training. Before calibration they are 0, and the model is dense. In a gated MLP with SiLU, they apply to
  `silu(gate(x))`, as in the paper.

  Attributes:
    inner: creates the inner activation, `config.activation.inner`.
    density: fraction of each layer's units that are kept on the calibration text.
  """

  inner: Callable[[], nn.Module]
  density: float = ranged(0.5, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='CATS (Lee et al. 2024)',
      saves='the down- and, in a gated MLP, the up-projection of the other units',
      twin='relu2',
      gating=Gating(planned=self.density),
    )

  @nn.compact
  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Returns the activations of `h`, with the same shape `[..., F]`."""
    value = record.site(self, 'value', self.inner()(h, mode))
    small = below(self, 'value', value)
    sow.sow_selected(self, ~small, mode)
    return jnp.where(small, 0, value)
