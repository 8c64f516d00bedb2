"""Every query reads the newest keys only."""

from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.attention import Mask
from sparse_lm.layers.attention import MaskedAttention
from sparse_lm.layers.method import Traits


class SlidingWindow(MaskedAttention):
  """Causal attention to the last `window` positions, the query's own included.

  Attributes:
    window: positions; `query - window < key <= query`.
  """

  window: int = ranged(32, '[1, 2^31)')

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Longformer (Beltagy et al. 2020), section 3.1, without dilation or global tokens',
      saves='scores and values of older keys',
      twin='full',
      reach=self.window,
    )

  @property
  def mask(self) -> Mask:
    """Keys within the window."""
    return Mask(window=self.window)
