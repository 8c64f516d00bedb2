"""Mixture of small experts whose loads a bias balances, beside experts that all tokens share."""

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


@dataclasses.dataclass(frozen=True)
class _TowardMean:
  """Moves each bias by `rate` towards a load that is the mean (Wang et al. 2024, algorithm 1)."""

  rate: float

  def __call__(self, bias_E: jax.Array, load_E: jax.Array) -> jax.Array:
    return bias_E + self.rate * jnp.sign(jnp.mean(load_E) - load_E)


class MoEBalanced(SharedMixture):
  """Each token goes to the `k * split` small experts whose score and bias add up to most.

  Every expert is cut into `split` small ones of `hidden / split` units each, and a token visits `split`
  times as many, for the same compute and far more combinations. Scores are sigmoids. The bias decides
  which experts are chosen and nothing else: outputs are weighted by the scores alone. After an optimizer
  step it moves by `rate`, up for the experts that got fewer of the step's tokens than the mean and down
  for those that got more. No gradient, decay or evaluation touches it, and no expert drops a token.

  Differs from the paper: scores of chosen experts are made to sum to 1 by default, as in DeepSeek-V3, and
  there is no loss that balances a single sequence.

  Attributes:
    activation: makes the activation slot's module.
    experts: how many there would be without the split.
    k: experts that a token visits, without the split.
    split: small experts that one expert is cut into.
    shared: experts, each as large as a small one, that every token visits besides.
    hidden: units of an expert before it is cut, 0 = `config.model.hidden`.
    rate: of the bias, in scores for each optimizer step.
    normalise: whether the weights of a token's chosen experts are made to sum to 1.
    executor: 'sort', or 'einsum', the slow reference.
  """

  k: int = ranged(1, '[1, 2^16]')
  split: int = ranged(4, '[1, 2^16]')
  shared: int = ranged(1, '[0, 2^16]')
  rate: float = ranged(0.001, '[0, inf)')
  normalise: bool = True

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='DeepSeekMoE (Dai et al. 2024), balanced without a loss (Wang et al. 2024)',
      saves='the experts that a token does not visit; shared ones always run',
      twin='dense',
      gating=Gating(),
    )

  @property
  def count(self) -> int:
    """How many small experts the router chooses among."""
    return self.experts * self.split

  @property
  def units(self) -> int:
    """Hidden units of a small expert."""
    return super().units // self.split

  def check(self) -> None:
    """Raises UserError where fields do not fit each other or the model."""
    super().check()
    check_visits(self.k, self.experts)
    whole = self.hidden or self.spec.hidden
    valid = f'a divisor of the hidden units of an expert, {whole}'
    require(whole % self.split == 0, 'config.mlp.split', self.split, valid)

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """The experts with the largest biased scores, weighted by the scores."""
    score_TxE = jax.nn.sigmoid(Router(self.spec, self.count, name='router')(x_TxD))
    bias = self.variable('router', 'bias', jnp.zeros, (self.count,), jnp.float32)
    visits = self.k * self.split
    _, expert_TxK = top(jax.lax.stop_gradient(score_TxE) + bias.value, visits)
    weight_TxK = jnp.take_along_axis(score_TxE, expert_TxK, axis=-1)
    if self.normalise:
      weight_TxK /= jnp.maximum(jnp.sum(weight_TxK, axis=-1, keepdims=True), 1e-20)
    if mode == 'train':
      load_E = dispatch.load(expert_TxK, self.count)
      after_step(self, 'router', 'bias', load_E, _TowardMean(self.rate))
    probability_TxE = score_TxE / jnp.maximum(jnp.sum(score_TxE, axis=-1, keepdims=True), 1e-20)
    return Routing(expert_TxK, weight_TxK, probability_TxE, float(visits))
