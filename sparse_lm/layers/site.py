"""The base class of site methods, which change activations at named points of the model (sites)."""

import jax

from sparse_lm.layers.method import LayerMethod


class SiteMethod(LayerMethod):
  """Changes the activations at some sites, in the same way in every mode.

  A subclass defines only `act`. The parameters and everything else of the site's module stay the same.

  Attributes:
    where: names of sites as in `ModelPlan.sites`, or shell patterns such as 'block_*/mlp/hidden'.
  """

  where: tuple[str, ...] = ()

  def act(self, value: jax.Array) -> jax.Array:
    """Returns the changed activations `[..., units]` of a site, with the same shape and dtype."""
    raise NotImplementedError(type(self).__name__)
