"""Exact top-k of the hidden units."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers import sow
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'top-k'


class TopK(LayerMethod):
  """Applies another activation to the largest hidden units of each token; all other units become zero.

  Attributes:
    inner: creates the activation that is applied, `config.activation.inner`.
    density: fraction of the units that is active.
  """

  inner: Callable[[], nn.Module]
  density: float = ranged(0.125, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='as in Spark (You et al. 2025), but exact',
      saves='the down-projection of the other units (up runs in full)',
      twin='relu2',
      gating=Gating(planned=self.density),
    )

  @nn.compact
  def __call__(self, h: jax.Array, mode: str) -> jax.Array:
    """Maps `[..., F]` to `[..., F]`; keeps at most `max(1, round(density * F))` units per row."""
    if self.density == 1:
      return self.inner()(h, mode)
    k = max(1, round(self.density * h.shape[-1]))
    mask = topk_rows(jax.lax.stop_gradient(h), k)
    sow.sow_selected(self, mask, mode)
    return jnp.where(mask, self.inner()(h, mode), 0)
