"""Mixture of experts in which the experts choose their tokens."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers.method import Traits
from sparse_lm.layers.mixture import MixtureOfExperts
from sparse_lm.layers.router import Router
from sparse_lm.layers.routing import Routing
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'expert-choice MoE'


class ExpertChoice(MixtureOfExperts):
  """Each expert takes the tokens of the batch with the highest scores, `visits / experts` of all tokens.

  The load is perfectly balanced, but the choice is not causal: it depends on all other tokens. So only
  training routes like this. In evaluation an expert takes every token whose score exceeds a threshold:
  the moving average of the lowest score that the expert took in training.

  Attributes:
    activation: creates the module of the activation slot.
    experts: number of experts.
    visits: experts that a token visits on average (the paper's capacity factor).
    hidden: hidden units of an expert; 0 = `config.model.hidden`.
    decay: decay of the moving average of the thresholds.
    executor: 'sort', or 'einsum', which is a slow reference.
  """

  visits: float = ranged(1.0, '(0, inf)')
  decay: float = ranged(0.95, '[0, 1)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='Zhou et al. 2022',
      saves='the experts that a token does not visit',
      twin='dense',
      gating=Gating(),
      non_causal=('train',),
      couples=('train',),
    )

  def check(self) -> None:
    """Raises UserError if the fields do not fit each other or the context."""
    super().check()
    least = self.experts / self.spec.context
    require(
      least <= self.visits <= self.experts,
      'config.mlp.visits',
      self.visits,
      f'{least:.4g} (below, an expert takes no token of a sequence) to the number of experts, '
      f'{self.experts}',
    )

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Gives each token one choice for each expert, which is valid if the expert takes the token."""
    logits_TxE = Router(self.spec, self.experts, name='router')(x_TxD)
    probability_TxE = jax.nn.softmax(logits_TxE)
    taken_TxE, capacity = self._take(probability_TxE, mode)
    choice_TxE = jnp.where(taken_TxE, jnp.arange(self.experts), self.experts)
    return Routing(choice_TxE, probability_TxE, probability_TxE, self.visits, capacity)

  def _take(self, probability_TxE: jax.Array, mode: str) -> tuple[jax.Array, int]:
    """Returns the tokens that each expert takes, bool `[T, E]`, and the most tokens that one takes."""
    tokens = probability_TxE.shape[0]
    start = nn.initializers.constant(1 / self.experts)
    threshold = self.variable('router', 'threshold', start, None, (self.experts,), jnp.float32)
    if mode != 'train':
      return probability_TxE > threshold.value, tokens
    capacity = max(1, round(self.visits * tokens / self.experts))
    scores_ExT = jax.lax.stop_gradient(probability_TxE).T
    taken_ExT = topk_rows(scores_ExT, capacity)
    lowest_E = jnp.min(jnp.where(taken_ExT, scores_ExT, jnp.inf), axis=-1)
    if self.is_mutable_collection('router'):
      threshold.value = self.decay * threshold.value + (1 - self.decay) * lowest_E
    return taken_ExT.T, capacity
