"""Activations as modules compute them."""

from sparse_lm.layers.method import Traits
from sparse_lm.layers.site import SiteMethod


class NoSites(SiteMethod):
  """Changes nothing anywhere."""

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='none', saves='nothing')
