"""Top-k of the magnitudes of activations, at named sites."""

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers.method import Traits
from sparse_lm.layers.site import SiteMethod

DISPLAY_NAME = 'top-k magnitudes'


class AbsTopK(SiteMethod):
  """Keeps the activations of largest magnitude of each token at every site, and sets the others to zero.

  Ties go to the unit of lower index. Only kept activations get a gradient. The default sites are the
  eight of the paper: the inputs and outputs of attention and of the MLP; queries, keys and values before
  the rotary positions, the heads ranked together; and the hidden units of the MLP.

  Attributes:
    density: fraction of a site's units that is kept for each token, at least one unit.
  """

  where: tuple[str, ...] = (
    *('block_*/attention/input', 'block_*/attention/output'),
    *(f'block_*/attention/{name}/output' for name in ('query', 'key', 'value')),
    *('block_*/mlp/input', 'block_*/mlp/hidden', 'block_*/mlp/output'),
  )
  density: float = ranged(0.25, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Weight-sparse transformers have interpretable circuits (Gao et al. 2025)',
      saves='nothing: zeros are multiplied like all other activations',
    )

  def act(self, value: jax.Array) -> jax.Array:
    """Maps `[..., units]` to the same shape; keeps `max(1, round(density * units))` units per row."""
    if self.density == 1:
      return value
    k = max(1, round(self.density * value.shape[-1]))
    return jnp.where(topk_rows(jax.lax.stop_gradient(jnp.abs(value)), k), value, 0)
