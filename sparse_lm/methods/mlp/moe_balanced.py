"""A mixture of small experts, balanced by a bias, beside shared experts (DeepSeekMoE)."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import require
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.topk import top
from sparse_lm.layers import dispatch
from sparse_lm.layers.after_step import after_step
from sparse_lm.layers.method import Traits
from sparse_lm.layers.mixture import SharedMixture, check_visits
from sparse_lm.layers.router import Router
from sparse_lm.layers.routing import Routing
from sparse_lm.plan.cost import Gating

DISPLAY_NAME = 'balanced MoE'


@dataclasses.dataclass(frozen=True)
class _TowardMean:
  """Moves each bias by `rate` so that the load approaches the mean (Wang et al. 2024, algorithm 1)."""

  rate: float

  def __call__(self, bias_E: jax.Array, load_E: jax.Array) -> jax.Array:
    return bias_E + self.rate * jnp.sign(jnp.mean(load_E) - load_E)


class MoEBalanced(SharedMixture):
  """Each token visits the `k * split` small experts with the largest sum of score and bias.

  Each expert is split into `split` small experts of `hidden / split` units, and a token visits `split`
  times as many: the compute is the same, and there are far more combinations. Scores are sigmoids. The
  bias only affects which experts are chosen; outputs are weighted by the scores alone. After each
  optimizer step the bias of an expert rises by `rate` if the expert got fewer of the step's tokens than
  the mean, and falls by `rate` if it got more. Gradients, weight decay and evaluation do not change it.
  No expert drops a token.

  Differs from the paper: by default the scores of the chosen experts are normalised to sum to 1, as in
  DeepSeek-V3, and there is no balancing loss within a sequence.

  Attributes:
    activation: creates the module of the activation slot.
    experts: number of experts before the split.
    k: experts that a token visits before the split.
    split: number of small experts that each expert is split into.
    shared: number of small experts that every token visits in addition.
    hidden: hidden units of an expert before the split; 0 = `config.model.hidden`.
    rate: change of a bias in an optimizer step, in units of the score.
    normalise: True normalises the weights of a token's chosen experts to sum to 1.
    executor: 'sort', or 'einsum', which is a slow reference.
  """

  k: int = ranged(1, '[1, 2^16]')
  split: int = ranged(4, '[1, 2^16]')
  shared: int = ranged(1, '[0, 2^16]')
  rate: float = ranged(0.001, '[0, inf)')
  normalise: bool = True

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='DeepSeekMoE (Dai et al. 2024), balanced without a loss (Wang et al. 2024)',
      saves='the experts that a token does not visit; shared ones always run',
      twin='dense',
      gating=Gating(),
    )

  @property
  def count(self) -> int:
    """The number of small experts that the router chooses among."""
    return self.experts * self.split

  @property
  def units(self) -> int:
    """The hidden units of a small expert."""
    return super().units // self.split

  def check(self) -> None:
    """Raises UserError if the fields do not fit each other or the model."""
    super().check()
    check_visits(self.k, self.experts)
    whole = self.hidden or self.spec.hidden
    valid = f'a divisor of the hidden units of an expert, {whole}'
    require(whole % self.split == 0, 'config.mlp.split', self.split, valid)

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Chooses the experts with the largest biased scores, and weights them by their scores."""
    score_TxE = jax.nn.sigmoid(Router(self.spec, self.count, name='router')(x_TxD))
    bias = self.variable('router', 'bias', jnp.zeros, (self.count,), jnp.float32)
    visits = self.k * self.split
    _, expert_TxK = top(jax.lax.stop_gradient(score_TxE) + bias.value, visits)
    weight_TxK = jnp.take_along_axis(score_TxE, expert_TxK, axis=-1)
    if self.normalise:
      weight_TxK /= jnp.maximum(jnp.sum(weight_TxK, axis=-1, keepdims=True), 1e-20)
    if mode == 'train':
      load_E = dispatch.expert_load(expert_TxK, self.count)
      after_step(self, 'router', 'bias', load_E, _TowardMean(self.rate))
    probability_TxE = score_TxE / jnp.maximum(jnp.sum(score_TxE, axis=-1, keepdims=True), 1e-20)
    return Routing(expert_TxK, weight_TxK, probability_TxE, float(visits))
