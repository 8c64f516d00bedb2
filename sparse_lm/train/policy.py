"""Policy gradients for sampled gates (REINFORCE, Williams 1992)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree

Array = jax.Array


class Policy(NamedTuple):
  """The actions of one gate; `[B, L]`, or `[B, 1]` if it decides once per sequence.

  Attributes:
    log_prob: float32, sum of the log-probabilities of the actions at each position.
    entropy: float32, sum of the entropies of their distributions, in nats.
    open: float32, fraction of the gate's units that are open.
  """

  log_prob: Array
  entropy: Array
  open: Array


def actions(variables: Tree) -> dict[str, Policy]:
  """Returns the actions of every sampled gate, from the collection `policy`, by the gate's path."""
  named = tree.named(variables['policy'])
  paths = {str(Place.parse(path).module) for path in named}
  return {
    path: Policy(*(named[f'{path}/{field}'] for field in Policy._fields)) for path in sorted(paths)
  }


def reward(losses_BxL: Array, policies: dict[str, Policy], shares: dict[str, Array]) -> Array:
  """Returns the reward of each token, `-CE - sum over gates of share * open`, float32 `[B, L]`.

  Args:
    losses_BxL: cross-entropy of each token.
    policies: actions by the path of the gate.
    shares: cost in nats of opening all units of a gate for a token, by the path of the gate; `[B, L]`, or
      an array that broadcasts to it.
  """
  return -losses_BxL - sum(
    (shares[path] * policy.open for path, policy in policies.items()), jnp.float32(0)
  )


def loss(
  policies: dict[str, Policy], reward_BxL: Array, baseline_BxL: Array, entropy_bonus: float
) -> Array:
  """Returns a scalar whose gradient is minus the policy gradient of the mean reward per token.

  An action is rewarded by the losses at its own and later positions. It cannot change earlier losses,
  because the model is causal, and omitting them lowers the variance without bias. `baseline_BxL` is
  subtracted for the same reason; it must not depend on the sampled actions.
  """
  advantage = jax.lax.stop_gradient(reward_BxL - baseline_BxL)
  to_go = jnp.cumsum(advantage[:, ::-1], axis=1)[:, ::-1]
  total = jnp.float32(0)
  for policy in policies.values():
    credit = to_go[:, : policy.log_prob.shape[1]]
    total += jnp.sum(credit * policy.log_prob) + entropy_bonus * jnp.sum(policy.entropy)
  return -total / reward_BxL.size
