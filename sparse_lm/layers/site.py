"""The base class of site methods, which change activations at named points of the model (sites)."""

import jax
from flax import linen as nn

from sparse_lm.layers.method import LayerMethod


class SiteMethod(LayerMethod):
  """Changes the activations at some sites, in the same way in every mode.

  A subclass defines only `act`, or `act_in` if it needs the site's module. Its parameters stay the same.

  Attributes:
    where: names of sites as in `ModelPlan.sites`, or shell patterns such as 'block_*/mlp/hidden'.
  """

  where: tuple[str, ...] = ()

  def act(self, value: jax.Array) -> jax.Array:
    """Returns the changed activations `[..., units]` of a site, with the same shape and dtype."""
    raise NotImplementedError(type(self).__name__)

  def act_in(self, module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Returns the changed activations of the site `name` of a module, which may hold variables for it.

    By default these are the result of `act`, which is then the same for all sites.
    """
    return self.act(value)
