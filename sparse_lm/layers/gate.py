"""The base class of learned gates: fields, checks, decisions, and the values that they sow."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import unknown
from sparse_lm.core.estimator import ESTIMATORS, Decision
from sparse_lm.core.ranges import ranged
from sparse_lm.layers.draws import fixed_key
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import sow, sow_open
from sparse_lm.layers.spec import Spec
from sparse_lm.plan.cost import Gating


class LearnedGate(LayerMethod):
  """A gate that turns logits into decisions with any estimator.

  Attributes:
    estimator: name of an estimator in `core/estimator.py`.
    open: probability that a sampled gate is open at the start of training (through the router's bias).
      For 'random' gates it is the fraction of open gates throughout. Evaluation does not sample: a gate
      opens if its probability is above 0.5, or above 0.31 for 'hard_concrete', whose gates close only
      where the stretched sigmoid is below zero.
    estimators: names of the estimators that this gate accepts.
  """

  spec: Spec
  estimator: str = 'straight_through'
  open: float = ranged(0.9, '(0, 1)')
  slot: ClassVar[str]
  estimators: ClassVar[tuple[str, ...]] = tuple(ESTIMATORS)

  def check(self) -> None:
    """Raises a UserError if this gate does not accept the estimator."""
    if self.estimator not in self.estimators:
      raise unknown(f'config.{self.slot}.estimator for this gate', self.estimator, self.estimators)

  def gate_traits(self, *, skips: bool = True, **declared: str | bool) -> Traits:
    """Returns the method's traits, completed by those that follow from the estimator.

    The planned fraction of a learned gate is 1, because it may open for every token.

    Args:
      skips: whether decoding skips the computation behind closed gates.
      declared: the other traits.
    """
    estimator = ESTIMATORS[self.estimator]
    planned = 1.0 if estimator.learned else self.open
    gating = Gating(planned=planned, controlled=estimator.controlled, skips=skips)
    return Traits(gating=gating, decodes=estimator.learned, policy=estimator.policy, **declared)

  @property
  def first_logit(self) -> float:
    """The logit with which a sampled gate is open with probability `open`."""
    return ESTIMATORS[self.estimator].logit(self.open)

  def decide(self, logits_BxLxU: jax.Array, mode: str) -> Decision:
    """Returns the decision for logits `[B, L or 1, units]`; sows its cost and a policy's statistics.

    In training, random numbers come from the `gates` stream. In evaluation, or without this stream, the
    estimator does not sample; 'random' gates then make the same decision in every call.
    """
    sample = mode == 'train' and self.has_rng('gates')
    key = self.make_rng('gates') if sample else fixed_key(self)
    estimator = ESTIMATORS[self.estimator]
    if not estimator.learned:  # the config sets the rate, not the router
      logits_BxLxU = jnp.full_like(logits_BxLxU, self.first_logit)
    decision = estimator.decide(logits_BxLxU, key, sample)
    sow_open(self, jnp.mean(decision.cost, axis=-1))
    if decision.log_prob is not None:
      sow(self, 'policy', 'log_prob', jnp.sum(decision.log_prob, axis=-1))
      sow(self, 'policy', 'entropy', jnp.sum(decision.entropy, axis=-1))
      sow(self, 'policy', 'open', jnp.mean(decision.factor, axis=-1))
    return decision


def normalised(x: jax.Array) -> jax.Array:
  """Scales `x` to unit mean square, float32, so that a gate's logits do not grow with depth."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
