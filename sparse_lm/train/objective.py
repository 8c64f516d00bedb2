"""What training minimises: cross-entropy, what modules add to it, and what running costs."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.estimator import ENTROPY_BONUS
from sparse_lm.core.tree import Tree
from sparse_lm.kernels.cross_entropy import Losses, Readout, cross_entropy
from sparse_lm.layers.after_step import UPDATES
from sparse_lm.layers.progress import Progress
from sparse_lm.layers.sow import SOWN, gate_activity
from sparse_lm.measure.observe import GATES
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.plan import cost
from sparse_lm.train import policy, states
from sparse_lm.train.control import Budget
from sparse_lm.train.distillation import Distillation
from sparse_lm.train.pass_costs import PassCosts
from sparse_lm.train.states import TrainState
from sparse_lm.weights import parts
from sparse_lm.weights.method import WeightMethod, mean_density

Array = jax.Array
Metrics = dict[str, Array]


class EffectiveParams(NamedTuple):
  """What a weight method makes of the trainable tree in a step.

  Attributes:
    params: as the model sees them.
    density: the fraction of each prunable leaf that runs, float32 scalars, `None` = dense.
    penalty: what the method adds to the loss, float32.
  """

  params: Tree
  density: Tree
  penalty: Array


class Batch(NamedTuple):
  """What a step learns from.

  Attributes:
    tokens_BxL1: int32 `[B, L + 1]`; each token but the first is predicted.
    teacher: what a teacher's logits are computed from, or its logits, float32 `[B, L, V]`; `None` without
      a teacher.
  """

  tokens_BxL1: Array
  teacher: Readout | Array | None

  def microbatches(self, number: int) -> 'Batch':
    """The batch as `number` parts along a new leading axis, without the teacher's head."""
    batch = self
    if isinstance(self.teacher, Readout):
      batch = self._replace(teacher=self.teacher._replace(head=None))
    return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), batch)

  def with_head_of(self, batch: 'Batch') -> 'Batch':
    """This part of `batch`, with the teacher's head that `batch` has."""
    if not isinstance(batch.teacher, Readout):
      return self
    return self._replace(teacher=self.teacher._replace(head=batch.teacher.head))


class Beside(NamedTuple):
  """What a forward pass in training leaves besides its loss.

  Attributes:
    model_state: the collections after it.
    updates: what modules sowed for when the optimizer step is done, see `layers/after_step.py`.
    metrics: by name.
  """

  model_state: Tree
  updates: Tree
  metrics: Metrics


class _Pass(NamedTuple):
  """A forward pass in training: the cross-entropy of each token, and what modules sowed."""

  losses_BxL: Array
  variables: Tree

  def beside(self, metrics: Metrics) -> Beside:
    """What the pass leaves, with its metrics."""
    updates = self.variables.get(UPDATES, {})
    return Beside(states.collections(self.variables), updates, metrics)


def observed(ledger: cost.Ledger, variables: Tree) -> Metrics:
  """What modules sowed into `stats`, and the fractions that gates, alone and nested, opened."""
  stats = tree.named(variables.get('stats', {}))
  fractions = cost.open_fractions(ledger, gate_activity(variables))
  return stats | {f'{GATES}{path}': value for path, value in fractions.items()}


@dataclasses.dataclass(frozen=True)
class Objective:
  """The loss of a model whose connections a weight method decides.

  Attributes:
    budget: holds the FLOPs that run at a target, or `None`.
    distillation: the weight and temperature of a teacher's loss, or `None`.
    steps: optimizer steps of the run, for the schedules of modules.
  """

  model: LM
  method: WeightMethod
  budget: Budget | None = None
  distillation: Distillation | None = None
  steps: int = 1

  @functools.cached_property
  def costs(self) -> PassCosts:
    """FLOPs per token of the model's passes."""
    return PassCosts(self.model, self.method)

  def loss(
    self,
    effective: EffectiveParams,
    state: TrainState,
    model_state: Tree,
    batch: Batch,
    key: Array,
  ) -> tuple[Array, Beside]:
    """The scalar to minimise.

    It is the mean in nats per token, of the last layer and the exits that a stack method sows together,
    with a teacher's part in it, plus what modules sowed into `losses`, the weight method's penalty, the
    budget's penalty and the loss of sampled policies.

    Args:
      effective: what is differentiated.
      state: of the step; its trainable tree is not read.
      model_state: collections of the model that are not parameters, before this pass.
      key: of dropout and of the gates' draws.

    Returns:
      The loss, and what the pass leaves beside it.
    """
    params, density, penalty = effective
    charged_density = self._charged_density(density, state.sparse.target)
    before = {'params': params, **model_state}
    forward = functools.partial(
      self.model.apply,
      before,
      batch.tokens_BxL1[:, :-1],
      'train',
      progress=Progress(state.step, self.steps),
      readout=True,
      mutable=[*SOWN, *model_state],
    )
    predicted, variables = forward(rngs={'dropout': key, 'gates': jax.random.fold_in(key, 1)})
    exits = lm.exit_predictions(self.model, before, variables, readout=True)
    loss, losses, learned = self.learned(predicted, exits, batch)
    sampled = _Pass(losses.nats, variables)
    seen = observed(self.costs.ledger, variables)
    metrics = learned | {'density': mean_density(density, params)} | seen
    metrics['flops_pass'] = self.costs.training_pass(density)
    auxiliary = sum(jax.tree.leaves(variables.get('losses', {})), penalty)
    activity = gate_activity(variables)
    if activity or self.method.traits.controlled:
      fraction = self.costs.fraction(charged_density, activity)
      metrics['flops_fraction'] = fraction
      if self.budget:
        auxiliary += self.budget.penalty(state.control, fraction)
    if 'policy' in variables:
      # Without draws gates act greedily: the self-critical baseline.
      predicted, of_greedy = forward(rngs={'dropout': key})
      _, losses = cross_entropy(jax.lax.stop_gradient(predicted), batch.tokens_BxL1[:, 1:])
      greedy = _Pass(losses.nats, of_greedy)
      auxiliary += self._policy_loss(state, charged_density, activity, sampled, greedy)
    metrics['auxiliary'] = auxiliary
    return loss + auxiliary, sampled.beside(metrics)

  def learned(
    self,
    predicted: Readout | Array,
    exits: list[tuple[Readout | Array, Array]],
    batch: Batch,
  ) -> tuple[Array, Losses, Metrics]:
    """The loss of a pass on the text, and on the teacher's predictions if there is a teacher.

    The cross-entropy behind the last layer has weight 1, and that of each exit has the exit's weight. The
    loss is the weighted mean of these, mixed with the divergence from the teacher.

    Args:
      predicted: logits behind the last layer, or what they are computed from.
      exits: the same for each exit, with the exit's weight.

    Returns:
      The loss, the last layer's losses of each token, and metrics.
    """
    targets_BxL = batch.tokens_BxL1[:, 1:]
    total = 1 + sum(weight for _, weight in exits)
    text, taught, temperature = 1.0, 0.0, 1.0
    if batch.teacher is not None:
      taught, temperature = self.distillation.weight, self.distillation.temperature
      text -= taught
    loss, losses = cross_entropy(
      predicted, targets_BxL, batch.teacher, (text / total, taught), temperature
    )
    nats = weighted = jnp.mean(losses.nats)
    for each, weight in exits:
      part, found = cross_entropy(each, targets_BxL, weights=(text * weight / total, 0.0))
      loss += part
      weighted += weight * jnp.mean(found.nats)
    metrics = {'loss': nats}
    if exits:
      metrics['exits_loss'] = weighted / total
    if batch.teacher is not None:
      metrics['divergence'] = jnp.mean(losses.divergence)
    return loss, losses, metrics

  def _charged_density(self, density: Tree, target: Tree) -> dict[str, Array]:
    """By path, the densities that are charged: those that are not learned as they are in the end."""
    now = tree.named(density)
    return {
      path: now[path] if parts.learns_density(self.method, path) else final
      for path, final in tree.named(target).items()
    }

  def _policy_loss(
    self,
    state: TrainState,
    charged_density: Tree,
    activity: dict[str, Array],
    sampled: _Pass,
    greedy: _Pass,
  ) -> Array:
    """REINFORCE with the greedy pass as baseline."""
    shares = jax.tree.map(jnp.zeros_like, activity)
    if self.budget:
      fraction, shares = jax.value_and_grad(lambda a: self.costs.fraction(charged_density, a))(
        activity
      )
      price = self.budget.price(state.control, fraction)
      # The gradient of a mean over tokens, times their number, is what opening costs each of them.
      shares = jax.tree.map(lambda share: price * share * share.size, shares)
    policies = [policy.sown(found.variables) for found in (sampled, greedy)]
    rewards = [
      policy.reward(found.losses_BxL, policies_of, shares)
      for found, policies_of in zip((sampled, greedy), policies)
    ]
    return policy.loss(policies[0], *rewards, ENTROPY_BONUS)
