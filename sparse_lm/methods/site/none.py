"""No change of activations."""

from sparse_lm.layers.method import Traits
from sparse_lm.layers.site import SiteMethod


class NoSites(SiteMethod):
  """Leaves all activations as they are."""

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='none', saves='nothing')
