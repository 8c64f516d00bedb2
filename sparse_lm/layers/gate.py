"""What every learned gate shares: fields, checks, and how its decision reaches loss and log."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import unknown
from sparse_lm.core.estimator import ESTIMATORS, Decision
from sparse_lm.core.ranges import ranged
from sparse_lm.layers.draws import fixed_key
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.sow import sow
from sparse_lm.layers.spec import Spec
from sparse_lm.plan.cost import Gating


class LearnedGate(LayerMethod):
  """A gate whose logits any estimator turns into a decision.

  Attributes:
    estimator: a name in `core/estimator.py`.
    open: probability with which a gate that is drawn in training is open at the start (at the router's
      bias); of 'random' gates, always. Evaluation draws nothing: it opens gates above a threshold, which
      is a probability of 0.5, and of 'hard_concrete' gates one of 0.31, since they close only where the
      stretched sigmoid falls below zero.
  """

  spec: Spec
  estimator: str = 'straight_through'
  open: float = ranged(0.9, '(0, 1)')
  slot: ClassVar[str]
  takes: ClassVar[tuple[str, ...]] = tuple(ESTIMATORS)

  def check(self) -> None:
    """Raises UserError for an estimator that this gate cannot take."""
    if self.estimator not in self.takes:
      raise unknown(f'config.{self.slot}.estimator for this gate', self.estimator, self.takes)

  def gate_traits(self, *, skips: bool = True, **declared: str | bool) -> Traits:
    """Traits with what follows from the estimator: a learned gate may open for everything.

    Args:
      skips: whether decoding leaves out what the gate closes.
      declared: the other traits.
    """
    estimator = ESTIMATORS[self.estimator]
    planned = 1.0 if estimator.learned else self.open
    gating = Gating(planned=planned, controlled=estimator.controlled, skips=skips)
    return Traits(gating=gating, decodes=estimator.learned, policy=estimator.policy, **declared)

  @property
  def first_logit(self) -> float:
    """The logit at which a drawn gate is open with probability `open`."""
    return ESTIMATORS[self.estimator].logit(self.open)

  def decide(self, logits_BxLxU: jax.Array, mode: str) -> Decision:
    """The decision for `[B, L or 1, units]` logits; sows its cost, and of a policy its actions.

    In training draws come from the `gates` stream. Without one, and in evaluation, the gate acts
    deterministically; what is random even then repeats from call to call.
    """
    sample = mode == 'train' and self.has_rng('gates')
    key = self.make_rng('gates') if sample else fixed_key(self)
    estimator = ESTIMATORS[self.estimator]
    if not estimator.learned:  # the rate is the config's, whatever the router says
      logits_BxLxU = jnp.full_like(logits_BxLxU, self.first_logit)
    decision = estimator.decide(logits_BxLxU, key, sample)
    sow(self, 'gates', 'active', jnp.mean(decision.cost, axis=-1))
    if decision.log_prob is not None:
      sow(self, 'policy', 'log_prob', jnp.sum(decision.log_prob, axis=-1))
      sow(self, 'policy', 'entropy', jnp.sum(decision.entropy, axis=-1))
      sow(self, 'policy', 'open', jnp.mean(decision.weight, axis=-1))
    return decision


def normalised(x: jax.Array) -> jax.Array:
  """float32 `x` at unit mean square: the residual stream grows with depth, a gate's logits need not."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
