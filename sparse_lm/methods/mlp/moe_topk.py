"""Mixture of experts in which each token chooses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require, unknown
from sparse_lm.core.ranges import ranged
from sparse_lm.layers import dispatch
from sparse_lm.layers.experts import Experts, observe_routing
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.router import Router
from sparse_lm.layers.sow import sow
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record
from sparse_lm.plan.cost import Gating


class MoETopK(LayerMethod):
  """Each token goes to the `k` experts that its router likes best.

  With k = 1 an expert's output is weighted by its probability (Switch), with more by the chosen
  probabilities made to sum to 1. A full expert drops tokens; its slots go by position (then sequence,
  then choice), so that no token is dropped for a later one.

  Differs from the paper: evaluation drops nothing by default, so that what a batch holds besides a
  sequence cannot change its loss; and second choices do not wait for everyone's first.

  Attributes:
    activation: makes the activation slot's module.
    experts: how many there are.
    k: experts that a token visits.
    hidden: units of an expert, 0 = `config.model.hidden`.
    capacity: slots of an expert in training, over its share of the tokens; 0 = as many as it needs.
    eval_capacity: the same in evaluation; decoding drops nothing.
    balance: coefficient of the load-balancing loss, which is that number at uniform routing.
    z: coefficient of the mean squared log-partition function of the router.
    jitter: training multiplies the router's inputs by uniform noise in 1 ± jitter.
    executor: 'sort', or 'einsum', the slow reference.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  experts: int = ranged(8, '[1, 2^16]')
  k: int = ranged(1, '[1, 2^16]')
  hidden: int = ranged(0, '[0, 2^24]')
  capacity: float = ranged(1.25, '[0, inf)')
  eval_capacity: float = ranged(0.0, '[0, inf)')
  balance: float = ranged(0.01, '[0, inf)')
  z: float = ranged(0.001, '[0, inf)')
  jitter: float = ranged(0.01, '[0, 1)')
  executor: str = 'sort'

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    # Where an expert's slots are limited, the sequences of a batch compete for them. Slots go by
    # position, so that a token loses none to a later one: the method stays causal all the same.
    return Traits(
      paper='Switch (Fedus et al. 2021) and top-2 (Shazeer et al. 2017, GShard 2020); z-loss of ST-MoE '
      '(Zoph et al. 2022)',
      saves='the experts that a token does not visit',
      twin='dense',
      gating=Gating(),
      couples=tuple(mode for mode in ('train', 'eval') if self._factor(mode) > 0),
    )

  def check(self) -> None:
    """Raises UserError where fields do not fit each other or the context."""
    valid = f'1 to the number of experts, {self.experts}'
    require(self.k <= self.experts, 'config.mlp.k', self.k, valid)
    for field in ('capacity', 'eval_capacity'):
      slots_of_one = getattr(self, field) * self.k * self.spec.context / self.experts
      least = self.experts / (self.k * self.spec.context)
      require(
        getattr(self, field) == 0 or slots_of_one >= 1,
        f'config.mlp.{field}',
        getattr(self, field),
        f'{least:.4g} or more (below, an expert has no slot for a sequence), or 0 for no limit',
      )
    if self.executor not in dispatch.EXECUTORS:
      raise unknown('config.mlp.executor', self.executor, dispatch.EXECUTORS)

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    b, l, d = x_BxLxD.shape
    # In order of position: that is how slots are given out.
    x_TxD = x_BxLxD.transpose(1, 0, 2).reshape(b * l, d)
    probability_TxE, expert_TxK, weight_TxK = self._route(x_TxD, mode)
    plan = self._plan(expert_TxK, mode)
    if mode == 'train':
      self._balance(plan.load_E, probability_TxE)
    observe_routing(self, plan.load_E, probability_TxE, plan.dropped)
    served_T = jnp.mean(plan.served_TxJ, axis=-1, dtype=jnp.float32)
    sow(self, 'gates', 'active', served_T.reshape(l, b).T)
    experts = Experts(
      self.spec, self.activation, self.experts, self.hidden or self.spec.hidden, name='experts'
    )
    if mode == 'decode' and l == 1 and expert_TxK.size <= self.experts:
      y_NxPxD = experts(
        jnp.repeat(x_TxD, self.k, axis=0)[:, None], expert_TxK.ravel(), b * self.k, mode
      )
      y_TxKxD = y_NxPxD.reshape(b, self.k, d)
      y_TxD = dispatch.weighted_sum(y_TxKxD, weight_TxK.astype(x_TxD.dtype))
      return y_TxD.reshape(b, l, d)
    x_NxPxD = dispatch.dispatch(x_TxD, plan, self.executor)
    expert_N = plan.expert_N if self._factor(mode) == 0 else None
    with record.gated(self.path, self.traits.gating):
      y_NxPxD = experts(x_NxPxD, expert_N, b * l * self.k, mode)
    y_TxD = dispatch.combine(y_NxPxD, plan, weight_TxK, self.executor)
    return y_TxD.reshape(l, b, d).transpose(1, 0, 2)

  def _factor(self, mode: str) -> float:
    return {'train': self.capacity, 'eval': self.eval_capacity, 'decode': 0.0}[mode]

  def _plan(self, expert_TxK: jax.Array, mode: str) -> dispatch.Plan:
    factor, pairs = self._factor(mode), expert_TxK.size
    if not factor:
      return dispatch.plan(expert_TxK, self.experts, None)
    # More slots than tokens could never be filled.
    capacity = min(-int(-factor * pairs // self.experts), expert_TxK.shape[0])
    return dispatch.plan(expert_TxK, self.experts, capacity)

  def _route(self, x_TxD: jax.Array, mode: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Probabilities `[T, E]`, and the chosen experts and their weights `[T, K]`."""
    x_TxD = x_TxD.astype(jnp.float32)
    if mode == 'train' and self.jitter and self.has_rng('gates'):
      low, high = 1 - self.jitter, 1 + self.jitter
      x_TxD *= jax.random.uniform(self.make_rng('gates'), x_TxD.shape, minval=low, maxval=high)
    logits_TxE = Router(self.spec, self.experts, scale=0.1**0.5, name='router')(x_TxD)
    probability_TxE = jax.nn.softmax(logits_TxE)
    weight_TxK, expert_TxK = jax.lax.top_k(probability_TxE, self.k)
    if self.k > 1:
      weight_TxK = weight_TxK / jnp.sum(weight_TxK, axis=-1, keepdims=True)
    if mode == 'train':
      square = jnp.mean(jnp.square(jax.nn.logsumexp(logits_TxE, axis=-1)))
      sow(self, 'losses', 'z', self.z * square)
    return probability_TxE, expert_TxK, weight_TxK

  def _balance(self, load_E: jax.Array, probability_TxE: jax.Array) -> None:
    share_E = load_E / jnp.sum(load_E)
    mean_E = jnp.mean(probability_TxE, axis=0)
    sow(self, 'losses', 'balance', self.balance * self.experts * jnp.sum(share_E * mean_E))
