"""Sets small inputs of linear layers to zero, below calibrated thresholds (TEAL)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.ranges import ranged
from sparse_lm.layers import sow
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.method import Traits
from sparse_lm.layers.site import SiteMethod
from sparse_lm.layers.threshold import below
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'TEAL'


class Teal(SiteMethod):
  """Sets an input of a linear layer to zero if its magnitude is below the threshold of the matrix.

  Each matrix has one threshold for all tokens and inputs. `python -m sparse_lm.prune` calibrates the
  thresholds on text, without training. Before calibration they are 0, and the model is dense. In a layer
  with full attention and a gated MLP, the default sites are the inputs of all seven matrices. The inputs
  of routers and experts are not changed.

  Differs from the paper: every matrix has the same density, but the paper chooses the densities within a
  layer by a greedy search. Here all tokens of a prompt are sparse, but the paper keeps the first half of
  them dense.

  Attributes:
    density: fraction of each matrix's inputs that are kept on the calibration text.
  """

  where: tuple[str, ...] = ('block_*/attention/*/input', 'block_*/mlp/*/input')
  density: float = ranged(0.5, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='TEAL (Liu et al. 2024)',
      saves='the weights of inputs that are zero, when one token is decoded',
      twin='none',
      gating=Gating(planned=self.density),
    )

  def act_in(self, module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Returns the inputs of a linear layer, `[..., in]`, with zeros for small ones.

    Activations of sites that are not in a linear layer are returned unchanged.
    """
    if not isinstance(module, Linear):
      return value
    small = below(module, name, value)
    sow.sow_open(module, jnp.mean(~small, axis=-1))
    return jnp.where(small, 0, value)
