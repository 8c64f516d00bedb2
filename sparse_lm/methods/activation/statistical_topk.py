"""Top-k of the hidden units by a threshold from their statistics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import gaussian_threshold
from sparse_lm.layers import sow
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'statistical top-k'


class StatisticalTopK(LayerMethod):
  """Subtracts a threshold from each token's hidden units and sets negative results to zero.

  It computes `inner(relu(h - threshold))`. A Gaussian variable with the mean and standard deviation of
  the token's units exceeds the threshold with probability `density`. If the units are not Gaussian,
  another fraction is active (fewer units if the tails are heavy): read the measured fraction in the log.
  Gradients flow through the mean and the standard deviation.

  Attributes:
    inner: creates the activation that is applied, `config.activation.inner`.
    density: fraction of the units that is active if they are Gaussian; 1 = no threshold.
  """

  inner: Callable[[], nn.Module]
  density: float = ranged(0.125, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Spark (You et al. 2025); shipped in Gemma 3n',
      saves='the down-projection of the other units (up runs in full)',
      twin='relu2',
      gating=Gating(planned=self.density),
    )

  @nn.compact
  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Maps `[..., F]` to `[..., F]`."""
    if self.density < 1:
      h = jnp.maximum(h - gaussian_threshold(h, self.density).astype(h.dtype), 0)
      sow.sow_selected(self, h > 0, mode)
    return self.inner()(h, mode)
