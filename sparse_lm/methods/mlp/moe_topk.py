"""A mixture of experts in which each token chooses its experts (Switch, GShard)."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import top
from sparse_lm.layers import dispatch
from sparse_lm.layers.method import Traits
from sparse_lm.layers.mixture import MixtureOfExperts, check_visits
from sparse_lm.layers.router import Router
from sparse_lm.layers.routing import Routing
from sparse_lm.layers.sow import sow
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'MoE'


class MoETopK(MixtureOfExperts):
  """Each token visits the `k` experts with the largest router probabilities.

  With k = 1 the output of an expert is weighted by its probability (Switch). With a larger k the weights
  are the chosen probabilities, which `normalise` divides by their sum (Mixtral, Jiang et al. 2024); OLMoE
  (Muennighoff et al. 2024) does not. An expert without free slots drops further tokens.
  Slots are filled in the order of positions (then of sequences, then of choices), so no token is dropped
  because of a later one.

  Differs from the paper: evaluation drops no token by default, so the other sequences of a batch cannot
  change a sequence's loss; and slots are not filled with the first choices of all tokens first.

  Attributes:
    activation: creates the module of the activation slot.
    experts: number of experts.
    k: experts that a token visits.
    hidden: hidden units of an expert; 0 = `config.model.hidden`.
    capacity: slots of an expert in training, divided by its even share of the tokens; 0 = no limit.
    eval_capacity: the same in evaluation; decoding drops no token.
    balance: coefficient of the load-balancing loss; with uniform routing the loss equals it.
    gated: True gives each expert a third matrix: `down(activation(gate(x)) * up(x))`.
    normalise: with k > 1, True divides the weights of a token's chosen experts by their sum.
    z: coefficient of the mean squared log-partition function of the router (z-loss).
    jitter: training multiplies the router's inputs by uniform noise in 1 ± jitter. The deviation from 1
      is drawn in the model's compute dtype, and the product is rounded to it, because in float32 these
      would be the largest arrays of a layer.
    executor: 'sort', or 'einsum', which is a slow reference.
  """

  k: int = ranged(1, '[1, 2^16]')
  capacity: float = ranged(1.25, '[0, inf)')
  eval_capacity: float = ranged(0.0, '[0, inf)')
  balance: float = ranged(0.01, '[0, inf)')
  gated: bool = False
  normalise: bool = True
  z: float = ranged(0.001, '[0, inf)')
  jitter: float = ranged(0.01, '[0, 1)')
  by_position: ClassVar[bool] = True

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    # If slots are limited, the sequences of a batch compete for them. Slots are filled in the order of
    # positions, so the method stays causal.
    return Traits(
      paper='Switch (Fedus et al. 2021) and top-2 (Shazeer et al. 2017, GShard 2020); z-loss of ST-MoE '
      '(Zoph et al. 2022)',
      saves='the experts that a token does not visit',
      twin='gated' if self.gated else 'dense',
      gating=Gating(),
      couples=tuple(mode for mode in ('train', 'eval') if self._factor(mode) > 0),
    )

  def check(self) -> None:
    """Raises UserError if the fields do not fit each other or the context."""
    super().check()
    check_visits(self.k, self.experts)
    least = self.experts / (self.k * self.spec.context)
    for field, factor in (('capacity', self.capacity), ('eval_capacity', self.eval_capacity)):
      slots_of_one = factor * self.k * self.spec.context / self.experts
      valid = (
        f'{least:.4g} or more (below, an expert has no slot for a sequence), or 0 for no limit'
      )
      require(factor == 0 or slots_of_one >= 1, f'config.mlp.{field}', factor, valid)

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Chooses the `k` most probable experts of each token."""
    if mode == 'train' and self.jitter and self.has_rng('gates'):
      key, dtype = self.make_rng('gates'), self.spec.compute
      noise_TxD = jax.random.uniform(key, x_TxD.shape, dtype, -self.jitter, self.jitter)
      factor_TxD = 1 + noise_TxD.astype(jnp.float32)
      x_TxD = (x_TxD.astype(jnp.float32) * factor_TxD).astype(x_TxD.dtype)
    logits_TxE = Router(self.spec, self.experts, scale=0.1**0.5, name='router')(x_TxD)
    probability_TxE = jax.nn.softmax(logits_TxE)
    weight_TxK, expert_TxK = top(probability_TxE, self.k)
    if self.k > 1 and self.normalise:
      weight_TxK = weight_TxK / jnp.sum(weight_TxK, axis=-1, keepdims=True)
    if mode == 'train':
      square = jnp.mean(jnp.square(jax.nn.logsumexp(logits_TxE, axis=-1)))
      sow(self, 'losses', 'z', self.z * square)
      self._balance(dispatch.expert_load(expert_TxK, self.experts), probability_TxE)
    capacity = self._capacity(expert_TxK, mode)
    return Routing(expert_TxK, weight_TxK, probability_TxE, float(self.k), capacity)

  def _factor(self, mode: str) -> float:
    return {'train': self.capacity, 'eval': self.eval_capacity, 'decode': 0.0}[mode]

  def _capacity(self, expert_TxK: jax.Array, mode: str) -> int | None:
    """Returns the slots of each expert, at most the number of tokens; `None` means no limit."""
    slots = -int(-self._factor(mode) * expert_TxK.size // self.experts)
    return min(slots, expert_TxK.shape[0]) or None

  def _balance(self, load_E: jax.Array, probability_TxE: jax.Array) -> None:
    share_E = load_E / jnp.sum(load_E)
    mean_E = jnp.mean(probability_TxE, axis=0)
    sow(self, 'losses', 'balance', self.balance * self.experts * jnp.sum(share_E * mean_E))
