"""The largest magnitudes of activations, at named sites."""

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers.method import Traits
from sparse_lm.layers.site import SiteMethod


class AbsTopK(SiteMethod):
  """Keeps the largest magnitudes of each token at every site with their signs, and zeroes the others.

  Ties go to the lower unit. Only what is kept gets a gradient. The default sites are the paper's eight:
  what enters and leaves attention and the MLP, queries, keys and values of all heads together before
  positions turn them, and the MLP's hidden units.

  Attributes:
    density: fraction of a site's units that is kept of each token, one at least.
  """

  where: tuple[str, ...] = (
    *('block_*/attention/input', 'block_*/attention/output'),
    *(f'block_*/attention/{name}/output' for name in ('query', 'key', 'value')),
    *('block_*/mlp/input', 'block_*/mlp/hidden', 'block_*/mlp/output'),
  )
  density: float = ranged(0.25, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Weight-sparse transformers have interpretable circuits (Gao et al. 2025)',
      saves='nothing: zeros are multiplied like all other activations',
    )

  def act(self, value: jax.Array) -> jax.Array:
    """`[..., units]`, of which `max(1, round(density * units))` of each row are kept."""
    if self.density == 1:
      return value
    k = max(1, round(self.density * value.shape[-1]))
    return jnp.where(topk_rows(jax.lax.stop_gradient(jnp.abs(value)), k), value, 0)
