"""Causal attention to all keys."""

from sparse_lm.layers.attention import MaskedAttention
from sparse_lm.layers.method import Traits


class Full(MaskedAttention):
  """Causal softmax attention; grouped-query attention if there are fewer key heads than query heads.

  A query reads a key if the key is valid and its position is not after the query's. Tokens that skip the
  layer are not valid keys of it; the other tokens keep their positions.
  """

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(paper='Vaswani et al. 2017; grouped-query: Ainslie et al. 2023', saves='nothing')
