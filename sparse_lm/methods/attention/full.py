"""Every query reads every key up to its own position."""

from sparse_lm.layers.attention import MaskedAttention
from sparse_lm.layers.method import Traits


class Full(MaskedAttention):
  """Causal softmax attention, grouped-query where k has fewer heads.

  A key is read where its position is not above the query's and it is valid: tokens that a layer
  skips keep their places.
  """

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(paper='Vaswani et al. 2017; grouped-query: Ainslie et al. 2023', saves='nothing')
