"""A fixed share of each sequence's tokens enters the layer."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.rows import inverse_index
from sparse_lm.kernels.topk import top
from sparse_lm.layers.gate import normalised
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.routed import gather_run_scatter, run_routed
from sparse_lm.layers.router import Router
from sparse_lm.layers.sow import sow, sow_open
from sparse_lm.layers.spec import Spec
from sparse_lm.layers.tokens import Tokens
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating


class MixtureOfDepths(LayerMethod):
  """The tokens with the largest router weights enter the layer and get `x + r * block(x)`, r the weight.

  In training, the `capacity` of each sequence's tokens with the largest weights enter, and the layer runs
  on these gathered tokens only. This choice depends on later tokens. So a small predictor learns from
  each single token whether it is chosen, and evaluation and decoding follow the predictor.

  Differs from the paper: the predictor is linear in the token and in the router's weight. Router and
  predictor read the token scaled to a mean square of one; otherwise the predictor's gradient outgrows the
  model's.

  Attributes:
    capacity: fraction of a sequence's tokens that enter the layer in training.
  """

  spec: Spec
  capacity: float = ranged(0.125, '(0, 1]')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Raposo et al. 2024',
      saves='the whole layer for tokens that skip it, keys and values included',
      twin='residual',
      gating=Gating(planned=self._entering(self.spec.context) / self.spec.context),
      non_causal=('train',),
    )

  def check(self) -> None:
    """Raises UserError if the capacity rounds to no token."""
    tokens = self.spec.context
    require(
      round(self.capacity * tokens) >= 1,
      'config.depth.capacity',
      self.capacity,
      f'a fraction that rounds to at least 1 of the {tokens} tokens',
    )

  def _entering(self, length: int) -> int:
    return max(1, round(self.capacity * length))

  @nn.compact
  def __call__(self, block: nn.Module, tokens: Tokens, mode: str) -> jax.Array:
    """Returns the residual stream `[B, L, D]` after the layer; see `Residual`."""
    weight_BxLx1 = Router(self.spec, 1, name='router')(normalised(tokens.x))
    likely_BxL = self._predict(tokens.x, weight_BxLx1)
    if mode == 'train':
      return self._train(block, tokens, weight_BxLx1, likely_BxL)
    entering = tokens.only(likely_BxL > 0)
    sow_open(self, entering.valid)
    with record.gated(self.path, self.traits.gating):
      added = run_routed(block, entering, mode)
    added = added * weight_BxLx1.astype(added.dtype)
    return tokens.x + jnp.where(entering.valid[..., None], added, 0)

  def _predict(self, x_BxLxD: jax.Array, weight_BxLx1: jax.Array) -> jax.Array:
    """Returns the logit of being chosen, for each token; its gradient trains only the predictor."""
    seen = jnp.concatenate([normalised(x_BxLxD), weight_BxLx1], axis=-1)
    predictor = Router(self.spec, 1, scale=0.1, bias=0.0, name='router_predictor')
    return predictor(jax.lax.stop_gradient(seen))[..., 0]

  def _train(
    self, block: nn.Module, tokens: Tokens, weight_BxLx1: jax.Array, likely_BxL: jax.Array
  ) -> jax.Array:
    valid_BxL, length = tokens.valid, tokens.x.shape[1]
    scores_BxL = jnp.where(valid_BxL, weight_BxLx1[..., 0], -jnp.inf)
    _, best_BxC = top(jax.lax.stop_gradient(scores_BxL), self._entering(length))
    index_BxC = jnp.sort(best_BxC, axis=1)
    # Padding of a short sequence may be chosen, but does not enter.
    chosen_BxL = inverse_index(index_BxC, length) < index_BxC.shape[1]
    enters_BxL = (chosen_BxL & valid_BxL).astype(jnp.float32)
    surprise_BxL = optax.sigmoid_binary_cross_entropy(likely_BxL, enters_BxL)
    sow(self, 'losses', 'predictor', jnp.mean(surprise_BxL, where=valid_BxL))
    agrees_BxL = (likely_BxL > 0) == (enters_BxL > 0)
    accuracy = jnp.mean(agrees_BxL, dtype=jnp.float32, where=valid_BxL)
    sow(self, 'stats', 'predictor_accuracy', accuracy)
    added = gather_run_scatter(block, tokens, index_BxC, 'train')
    return tokens.x + added * weight_BxLx1.astype(added.dtype)
