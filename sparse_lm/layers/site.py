"""Methods of the site slot: what they change are activations at points that modules name."""

import jax

from sparse_lm.layers.method import LayerMethod


class SiteMethod(LayerMethod):
  """Changes the activations at the sites that it names, in every mode alike.

  Sites are named as in `ModelPlan.sites`, or by shell patterns such as 'block_*/mlp/hidden'. Parameters
  and whatever else a site's module has are as without the method: a subclass defines `act` alone.

  Attributes:
    where: names of sites, or patterns of them.
  """

  where: tuple[str, ...] = ()

  def act(self, value: jax.Array) -> jax.Array:
    """What becomes of the activations `[..., units]` of a site; of the same shape and dtype."""
    raise NotImplementedError(type(self).__name__)
