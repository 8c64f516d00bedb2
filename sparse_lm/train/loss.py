"""The training loss: cross-entropy, what modules add to it, and what running costs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_lm.core import tree
from sparse_lm.core.estimator import ENTROPY_BONUS
from sparse_lm.core.tree import Tree
from sparse_lm.layers.record import SOWN
from sparse_lm.plan import cost
from sparse_lm.train import policy, states
from sparse_lm.train.states import TrainState
from sparse_lm.weights.method import mean_density

Array = jax.Array
Metrics = dict[str, Array]
Batch = tuple[Array, Array | None]  # tokens `[B, L + 1]`, and a teacher's logits `[B, L, V]`
Seen = tuple[Tree, Tree]  # parameters as the model sees them, and how much of each runs


@dataclasses.dataclass(frozen=True)
class Distillation:
  """`config.distill` without the teacher: `(1 - weight) CE + weight temperature^2 KL(teacher || model)`
  (Hinton et al. 2015, with the temperature's square so that gradients keep their size)."""

  weight: float
  temperature: float

  @classmethod
  def from_config(cls, config: Any) -> 'Distillation | None':
    """`None` without a teacher."""
    weight, temperature = config.distill.weight, config.distill.temperature
    return cls(weight, temperature) if config.distill.teacher else None

  def divergence(self, logits_BxLxV: Array, teacher_BxLxV: Array) -> Array:
    """KL in nats a token between the softened distributions, times the temperature's square."""
    ours, theirs = (
      jax.nn.log_softmax(logits / self.temperature) for logits in (logits_BxLxV, teacher_BxLxV)
    )
    return self.temperature**2 * jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1))


def token_losses(logits_BxLxV: Array, targets_BxL: Array) -> Array:
  """Cross-entropy of each token in nats, float32 `[B, L]`."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)


def activity_of(variables: Tree) -> dict[str, Array]:
  """The fraction of its units that every gate opened for each token, by the gate's path."""
  named = tree.named(variables.get('gates', {}))
  return {path.removesuffix('/active'): value for path, value in named.items()}


def _policies(variables: Tree) -> dict[str, policy.Policy]:
  """What every sampled gate sowed, by the gate's path."""
  named = tree.named(variables['policy'])
  paths = {path.rpartition('/')[0] for path in named}
  return {
    path: policy.Policy(*(named[f'{path}/{field}'] for field in policy.Policy._fields))
    for path in sorted(paths)
  }


def observed(program: Any, variables: Tree) -> Metrics:
  """What modules sowed into `stats`, and the fractions that gates, alone and nested, let through."""
  stats = tree.named(variables.get('stats', {}))
  fractions = cost.fractions(program.ledger, activity_of(variables))
  return stats | {f'gates/{path}': value for path, value in fractions.items()}


def loss(
  program: Any,
  seen: Seen,
  state: TrainState,
  model_state: Tree,
  batch: Batch,
  key: Array,
) -> tuple[Array, tuple[Tree, Metrics]]:
  """Mean nats per token, what modules sowed into `losses`, what running costs, and the teacher's part."""
  params, density = seen
  tokens_BxL1, teacher_BxLxV = batch
  # A density that is not learned is held at what it will be in the end.
  held = density if program.method.controlled else state.sparse.target

  def forward(**rngs: Array) -> tuple[Array, Array, Tree]:
    logits, variables = program.model.apply(
      {'params': params, **model_state},
      tokens_BxL1[:, :-1],
      mode='train',
      rngs=rngs,
      mutable=[*SOWN, *model_state],
    )
    return logits, token_losses(logits, tokens_BxL1[:, 1:]), variables

  logits, losses_BxL, variables = forward(dropout=key, gates=jax.random.fold_in(key, 1))
  nats = jnp.mean(losses_BxL)
  kept = mean_density(density, params)
  metrics = {'loss': nats, 'density': kept} | observed(program, variables)
  metrics['flops_pass'] = program.pass_flops(density)
  auxiliary = sum(jax.tree.leaves(variables.get('losses', {})), program.method.penalty(kept))
  activity = activity_of(variables)
  if activity or program.method.controlled:
    fraction = program.fraction(held, activity)
    metrics['flops_fraction'] = fraction
    if program.budget:
      auxiliary += program.budget.penalty(state.control, fraction)
  if 'policy' in variables:
    # Without draws gates act greedily: the self-critical baseline.
    _, greedy_BxL, greedy = forward(dropout=key)
    auxiliary += _policy_loss(
      program, state, held, activity, (losses_BxL, variables), (greedy_BxL, greedy)
    )
  metrics['auxiliary'] = auxiliary
  if teacher_BxLxV is not None:
    divergence = program.distillation.divergence(logits, teacher_BxLxV)
    metrics['divergence'] = divergence
    nats += program.distillation.weight * (divergence - nats)
  return nats + auxiliary, (states.collections(variables), metrics)


def _policy_loss(
  program: Any,
  state: TrainState,
  held: Tree,
  activity: dict[str, Array],
  sampled: tuple[Array, Tree],
  greedy: tuple[Array, Tree],
) -> Array:
  """REINFORCE with the greedy pass as baseline; both passes are (losses, variables)."""
  shares = jax.tree.map(jnp.zeros_like, activity)
  if program.budget:
    fraction, shares = jax.value_and_grad(lambda a: program.fraction(held, a))(activity)
    price = program.budget.price(state.control, fraction)
    # The gradient of a mean over tokens, times their number, is what opening costs each of them.
    shares = jax.tree.map(lambda share: price * share * share.size, shares)
  policies = [_policies(variables) for _, variables in (sampled, greedy)]
  rewards = [
    policy.reward(losses_BxL, policies_of, shares)
    for (losses_BxL, _), policies_of in zip((sampled, greedy), policies)
  ]
  return policy.loss(policies[0], *rewards, ENTROPY_BONUS)
