"""Policy gradients for gates that are sampled (REINFORCE, Williams 1992)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree

Array = jax.Array


class Policy(NamedTuple):
  """What one gate did; `[B, L]`, or `[B, 1]` where it decides once for a sequence.

  Attributes:
    log_prob: float32, of the actions at a position together.
    entropy: float32, of their distributions together, in nats.
    open: float32, fraction of the gate's units that were open there.
  """

  log_prob: Array
  entropy: Array
  open: Array


def sown(variables: Tree) -> dict[str, Policy]:
  """What every sampled gate sowed into the collection `policy`, by the gate's path."""
  named = tree.named(variables['policy'])
  paths = {str(Place.parse(path).module) for path in named}
  return {
    path: Policy(*(named[f'{path}/{field}'] for field in Policy._fields)) for path in sorted(paths)
  }


def reward(losses_BxL: Array, policies: dict[str, Policy], shares: dict[str, Array]) -> Array:
  """`-CE - sum over gates of share * open` for each token, float32 `[B, L]`.

  Args:
    losses_BxL: cross-entropies.
    policies: by the path of the gate.
    shares: what it costs in nats to have all of that gate open at a token, `[B, L]` or what
      broadcasts to it.
  """
  return -losses_BxL - sum(
    (shares[path] * policy.open for path, policy in policies.items()), jnp.float32(0)
  )


def loss(
  policies: dict[str, Policy], reward_BxL: Array, baseline_BxL: Array, entropy_bonus: float
) -> Array:
  """A scalar whose gradient is minus the policy gradient of the mean reward a token.

  An action is credited with what comes at its own position and later: the model is causal, so it
  cannot have changed what came before, and leaving that out lowers the variance and not the mean.
  `baseline_BxL` is subtracted for the same reason; it must not depend on the sampled actions.
  """
  advantage = jax.lax.stop_gradient(reward_BxL - baseline_BxL)
  to_go = jnp.cumsum(advantage[:, ::-1], axis=1)[:, ::-1]
  total = jnp.float32(0)
  for policy in policies.values():
    credit = to_go[:, : policy.log_prob.shape[1]]
    total += jnp.sum(credit * policy.log_prob) + entropy_bonus * jnp.sum(policy.entropy)
  return -total / reward_BxL.size
