"""Mixture of experts in which the experts choose their tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require, unknown
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import topk_rows
from sparse_lm.layers import dispatch
from sparse_lm.layers.experts import Experts, observe_routing
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.router import Router
from sparse_lm.layers.sow import sow
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating


class ExpertChoice(LayerMethod):
  """Each expert takes the `visits / experts` of the batch's tokens that score highest with it.

  Perfectly balanced, and not causal: whether an expert takes a token depends on all the others. So
  training alone routes like that. Evaluation takes what exceeds the expert's threshold, a moving
  average of the lowest score that it took in training, which needs no other token.


  Attributes:
    activation: makes the activation slot's module.
    experts: how many there are.
    visits: experts that a token visits on average (the paper's capacity factor).
    hidden: units of an expert, 0 = `config.model.hidden`.
    decay: of the thresholds' moving average.
    executor: 'sort', or 'einsum', the slow reference.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  experts: int = ranged(8, '[1, 2^16]')
  visits: float = ranged(1.0, '(0, inf)')
  hidden: int = ranged(0, '[0, 2^24]')
  decay: float = ranged(0.95, '[0, 1)')
  executor: str = 'sort'

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='Zhou et al. 2022',
      saves='the experts that a token does not visit',
      twin='dense',
      gating=Gating(),
      non_causal=('train',),
      couples=('train',),
    )

  def check(self) -> None:
    """Raises UserError where fields do not fit each other or the context."""
    least = self.experts / self.spec.context
    require(
      least <= self.visits <= self.experts,
      'config.mlp.visits',
      self.visits,
      f'{least:.4g} (below, an expert takes no token of a sequence) to the number of experts, '
      f'{self.experts}',
    )
    if self.executor not in dispatch.EXECUTORS:
      raise unknown('config.mlp.executor', self.executor, dispatch.EXECUTORS)

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    b, l, d = x_BxLxD.shape
    tokens = b * l
    x_TxD = x_BxLxD.reshape(tokens, d)
    logits_TxE = Router(self.spec, self.experts, name='router')(x_TxD)
    probability_TxE = jax.nn.softmax(logits_TxE)
    taken_TxE, capacity = self._take(probability_TxE, mode)
    choice_TxE = jnp.where(taken_TxE, jnp.arange(self.experts), self.experts)
    plan = dispatch.plan(choice_TxE, self.experts, capacity)
    observe_routing(self, plan.load_E, probability_TxE, plan.dropped)
    visits_T = jnp.sum(plan.served_TxJ, axis=-1, dtype=jnp.float32)
    sow(self, 'gates', 'active', (visits_T / self.visits).reshape(b, l))
    experts = Experts(
      self.spec, self.activation, self.experts, self.hidden or self.spec.hidden, name='experts'
    )
    if mode == 'decode' and tokens == 1:
      x_ExCxD = jnp.broadcast_to(x_TxD, (self.experts, 1, d))
      y_ExCxD = experts(x_ExCxD, choice_TxE[0], self.visits, mode)
      weight_TxE = probability_TxE.astype(x_TxD.dtype) * taken_TxE
      return dispatch.weighted_sum(y_ExCxD.swapaxes(0, 1), weight_TxE).reshape(b, l, d)
    x_ExCxD = dispatch.dispatch(x_TxD, plan, self.executor)
    with record.gated(self.path, self.traits.gating):
      y_ExCxD = experts(x_ExCxD, None, tokens * self.visits, mode)
    y_TxD = dispatch.combine(y_ExCxD, plan, probability_TxE, self.executor)
    return y_TxD.reshape(b, l, d)

  def _take(self, probability_TxE: jax.Array, mode: str) -> tuple[jax.Array, int]:
    """Which tokens an expert takes, bool `[T, E]`, and how many at most."""
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
