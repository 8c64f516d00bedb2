"""Causal attention to the newest keys."""

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.attention import Mask
from sparse_lm.layers.attention import MaskedAttention
from sparse_lm.layers.method import Traits


class SlidingWindow(MaskedAttention):
  """Causal attention to the last `window` positions, including the query's own.

  Attributes:
    window: positions that a query reads: `query - window < key <= query`.
  """

  window: int = ranged(32, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Longformer (Beltagy et al. 2020), section 3.1, without dilation or global tokens',
      saves='scores and values of older keys',
      twin='full',
      reach=self.window,
    )

  @property
  def mask(self) -> Mask:
    """The keys within the window."""
    return Mask(window=self.window)
