"""Gradients of things that have none: weights behind a mask, and gates that are open or closed.

An estimator turns a gate's logits into a `Decision`. It may sample while training; evaluation runs
its deterministic form. The price of a decision is always that of what evaluation would run, with the
gradient of the probability that it runs: so a budget held in training is held when it counts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.kernels.topk import topk_mask

Array = jax.Array

ENTROPY_BONUS = 1e-2  # of sampled policies, per decision in nats
# The hard concrete distribution's temperature and stretch (Louizos et al. 2018, section 4.1).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


@jax.custom_vjp
def straight_through(values: Array, mask: Array) -> Array:
  """`values` where `mask`, else zero; the gradient passes to all of `values` (Bengio et al. 2013)."""
  return jax.numpy.where(mask, values, 0)


def _forward(values: Array, mask: Array) -> tuple[Array, None]:
  return straight_through(values, mask), None


def _backward(_: None, gradient: Array) -> tuple[Array, None]:
  return gradient, None


straight_through.defvjp(_forward, _backward)


class Decision(NamedTuple):
  """What a gate decided; arrays of the logits' shape.

  Attributes:
    weight: float32, what the gated output is multiplied with.
    open: bool, whether it is to be computed.
    cost: float32, the fraction that evaluation runs; its gradient is the probability's.
    log_prob: float32, of a sampled policy's action, `None` of other estimators.
    entropy: float32, of its distribution in nats, or `None`.
  """

  weight: Array
  open: Array
  cost: Array
  log_prob: Array | None = None
  entropy: Array | None = None


def with_gradient_of(value: Array, surrogate: Array) -> Array:
  """`value`, with the gradient of `surrogate`; both of one shape."""
  return jax.lax.stop_gradient(value - surrogate) + surrogate


def with_gradient_to_score(seen: Array, score: Array, weights: Array) -> Array:
  """`seen`; a score gets the gradient of `seen` times the weight, straight through the mask."""
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
  """P(gate > 0) of a sampled hard concrete gate (Louizos et al. 2018, equation 12)."""
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
  # As many as the rate says, drawn without replacement: a baseline at exactly that rate.
  rate = jnp.mean(jax.nn.sigmoid(jax.lax.stop_gradient(logits)))
  action = topk_mask(jax.random.uniform(key, logits.shape), jnp.round(rate * logits.size))
  weight = action.astype(jnp.float32)
  return Decision(weight, action, weight)


@dataclasses.dataclass(frozen=True)
class Estimator:
  """How a gate's logits get a gradient.

  Attributes:
    decide: `(logits, key, sample) -> Decision`; `sample` in training, where draws are allowed.
    controlled: whether a price on its cost moves it.
    policy: whether it learns from rewards, by its log-probabilities.
    learned: whether it reads the gate's logits; if not it gets those of the rate it starts with.
    logit: the logit at which a gate is open with a given probability, where it is drawn. Deterministic
      gates take the same logit: 'soft' and 'straight_through', and in evaluation all but 'random', open
      where it is above the threshold of their `decide`.
  """

  decide: Callable[[Array, Array, bool], Decision]
  controlled: bool = True
  policy: bool = False
  learned: bool = True
  logit: Callable[[float], float] = logit


ESTIMATORS: dict[str, Estimator] = {
  # All open and weighted in training, thresholded in evaluation.
  'soft': Estimator(_soft),
  # Open where the logit is above 0; the sigmoid's gradient (Bengio et al. 2013).
  'straight_through': Estimator(_straight_through_sigmoid),
  # The same on logits with logistic noise (Jang et al. 2017; temperature 1).
  'gumbel_sigmoid': Estimator(_gumbel_sigmoid),
  # A stretched and clipped concrete variable (Louizos et al. 2018).
  'hard_concrete': Estimator(_hard_concrete, logit=hard_concrete_logit),
  # A sampled policy, trained by its reward (Williams 1992).
  'reinforce': Estimator(_reinforce, policy=True),
  # Opens a fixed share of a batch's gates whatever the input: the baseline of the others.
  'random': Estimator(_random, controlled=False, learned=False),
}
