"""Gradient estimators for discrete decisions: masked weights, and gates that are open or closed.

An estimator turns a gate's logits into a `Decision`. It may sample in training; in evaluation it is
deterministic. The cost of a decision is always the cost of the deterministic decision, so a budget that
is met in training is also met in evaluation. The gradient of the cost is the gradient of the probability
that the gate opens.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.kernels.topk import topk_mask

Array = jax.Array

ENTROPY_BONUS = 1e-2  # weight of a sampled policy's entropy (nats per decision) in the loss
# Temperature and stretch interval of the hard concrete distribution (Louizos et al. 2018, section 4.1).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


@jax.custom_vjp
def straight_through(values: Array, mask: Array) -> Array:
  """Masks `values`, but passes the gradient on to all of them unmasked (Bengio et al. 2013)."""
  return jax.numpy.where(mask, values, 0)


def _forward(values: Array, mask: Array) -> tuple[Array, None]:
  return straight_through(values, mask), None


def _backward(_: None, gradient: Array) -> tuple[Array, None]:
  return gradient, None


straight_through.defvjp(_forward, _backward)


class Decision(NamedTuple):
  """A gate's decisions; all arrays have the shape of the logits.

  Attributes:
    factor: float32, the number that the gated output is multiplied by.
    open: bool, whether the gated output is computed.
    cost: float32, 1 where the deterministic gate is open, else 0. Its gradient is the gradient of the
      probability that the gate opens.
    log_prob: float32, log-probability of a sampled policy's action; `None` for other estimators.
    entropy: float32, entropy in nats of a sampled policy's distribution; `None` for other estimators.
  """

  factor: Array
  open: Array
  cost: Array
  log_prob: Array | None = None
  entropy: Array | None = None


def with_gradient_of(value: Array, surrogate: Array) -> Array:
  """Returns `value` with the gradient of `surrogate`, which has the same shape."""
  return jax.lax.stop_gradient(value - surrogate) + surrogate


def with_gradient_to_score(seen: Array, score: Array, weights: Array) -> Array:
  """Returns `seen` unchanged; in the backward pass, `score` gets the gradient of `seen` times `weights`.

  Args:
    seen: the masked weights.
    score: learned scores of the weights; their gradient passes straight through the mask.
    weights: the weights before masking.
  """
  return seen + (weights * (score - jax.lax.stop_gradient(score))).astype(seen.dtype)


def _soft(logits: Array, key: Array, sample: bool) -> Decision:
  probability, fires = jax.nn.sigmoid(logits), logits > 0
  cost = with_gradient_of(fires, probability)
  opened = jnp.ones_like(fires) if sample else fires
  return Decision(jnp.where(opened, probability, 0.0), opened, cost)


def _straight_through_sigmoid(logits: Array, key: Array, sample: bool) -> Decision:
  fires = logits > 0
  gate = with_gradient_of(fires, jax.nn.sigmoid(logits))
  return Decision(gate, fires, gate)


def _gumbel_sigmoid(logits: Array, key: Array, sample: bool) -> Decision:
  noise = jax.random.logistic(key, logits.shape) if sample else 0.0
  fires = logits + noise > 0
  gate = with_gradient_of(fires, jax.nn.sigmoid(logits + noise))
  return Decision(gate, fires, with_gradient_of(logits > 0, jax.nn.sigmoid(logits)))


def _hard_concrete(logits: Array, key: Array, sample: bool) -> Decision:
  if sample:
    s = jax.nn.sigmoid((logits + jax.random.logistic(key, logits.shape)) / BETA)
  else:
    s = jax.nn.sigmoid(logits)
  gate = jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
  evaluated = jax.nn.sigmoid(logits) * (ZETA - GAMMA) + GAMMA > 0
  return Decision(gate, gate > 0, with_gradient_of(evaluated, hard_concrete_probability(logits)))


def hard_concrete_probability(logits: Array) -> Array:
  """Returns P(gate > 0) of a sampled hard concrete gate (Louizos et al. 2018, equation 12)."""
  return jax.nn.sigmoid(logits - BETA * jnp.log(-GAMMA / ZETA))


def logit(probability: float) -> float:
  """The inverse of the sigmoid."""
  return math.log(probability / (1 - probability))


def hard_concrete_logit(probability: float) -> float:
  """The inverse of `hard_concrete_probability`."""
  return logit(probability) + BETA * math.log(-GAMMA / ZETA)


def _reinforce(logits: Array, key: Array, sample: bool) -> Decision:
  log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
  action = jax.random.bernoulli(key, jax.nn.sigmoid(logits)) if sample else logits > 0
  entropy = -(jnp.exp(log_p) * log_p + jnp.exp(log_q) * log_q)
  log_prob = jnp.where(action, log_p, log_q)
  cost = (logits > 0).astype(jnp.float32)
  return Decision(action.astype(jnp.float32), action, cost, log_prob, entropy)


def _random(logits: Array, key: Array, sample: bool) -> Decision:
  # Draws without replacement, so the fraction of open gates is exactly the rate.
  rate = jnp.mean(jax.nn.sigmoid(jax.lax.stop_gradient(logits)))
  action = topk_mask(jax.random.uniform(key, logits.shape), jnp.round(rate * logits.size))
  factor = action.astype(jnp.float32)
  return Decision(factor, action, factor)


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A rule that turns a gate's logits into decisions and gives the logits a gradient.

  Attributes:
    decide: `(logits, key, sample) -> Decision`; `sample` is true in training, where it may draw.
    controlled: whether a penalty on the cost changes how many gates open.
    policy: whether it learns from rewards through its log-probabilities.
    learned: whether the gate has learned logits. If not, it gets the logit of its initial rate.
    logit: returns the logit with which a sampled gate is open with a given probability. Estimators that
      do not sample ('soft' and 'straight_through', and in evaluation all but 'random') start from the
      same logit. Their gates are open where the logit is above the threshold in `decide`.
  """

  decide: Callable[[Array, Array, bool], Decision]
  controlled: bool = True
  policy: bool = False
  learned: bool = True
  logit: Callable[[float], float] = logit


ESTIMATORS: dict[str, Estimator] = {
  # In training all gates are open and weighted; in evaluation they open above a threshold.
  'soft': Estimator(_soft),
  # Opens where the logit is above 0, with the gradient of the sigmoid (Bengio et al. 2013).
  'straight_through': Estimator(_straight_through_sigmoid),
  # Straight-through on logits with logistic noise (Jang et al. 2017; temperature 1).
  'gumbel_sigmoid': Estimator(_gumbel_sigmoid),
  # A stretched and clipped concrete variable (Louizos et al. 2018).
  'hard_concrete': Estimator(_hard_concrete, logit=hard_concrete_logit),
  # A sampled policy, trained by its reward (Williams 1992).
  'reinforce': Estimator(_reinforce, policy=True),
  # A baseline: opens a fixed fraction of the gates in a batch, whatever the input.
  'random': Estimator(_random, controlled=False, learned=False),
}
