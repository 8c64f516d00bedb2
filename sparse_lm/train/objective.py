"""The training loss: cross-entropy, auxiliary losses of modules, and penalties for costs."""

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
  """The output of a weight method's `effective` and `penalty` in a step.

  Attributes:
    params: the effective parameters, with which the model computes.
    density: float32 density of each prunable leaf; `None` for dense leaves.
    penalty: float32 term that the method adds to the loss.
  """

  params: Tree
  density: Tree
  penalty: Array


class Batch(NamedTuple):
  """A training batch.

  Attributes:
    tokens_BxL1: int32 `[B, L + 1]`; all tokens but the first are targets.
    teacher: a teacher's `Readout` or logits, float32 `[B, L, V]`; `None` without a teacher.
  """

  tokens_BxL1: Array
  teacher: Readout | Array | None

  def microbatches(self, number: int) -> 'Batch':
    """Splits the batch into `number` parts along a new leading axis; omits the teacher's head."""
    batch = self
    if isinstance(self.teacher, Readout):
      batch = self._replace(teacher=self.teacher._replace(head=None))
    return jax.tree.map(lambda a: a.reshape(number, -1, *a.shape[1:]), batch)

  def with_head_of(self, batch: 'Batch') -> 'Batch':
    """Returns this microbatch with the teacher's head, which microbatches share, taken from `batch`."""
    if not isinstance(batch.teacher, Readout):
      return self
    return self._replace(teacher=self.teacher._replace(head=batch.teacher.head))


class Aux(NamedTuple):
  """The auxiliary outputs of the loss.

  Attributes:
    model_state: the model's collections after the forward pass.
    updates: the `StepUpdate` values that modules sowed (`layers/after_step.py`).
    metrics: metrics by name.
  """

  model_state: Tree
  updates: Tree
  metrics: Metrics


class _Pass(NamedTuple):
  """A training forward pass: the cross-entropy of each token, and the returned collections."""

  losses_BxL: Array
  variables: Tree

  def aux(self, metrics: Metrics) -> Aux:
    """Returns the auxiliary outputs of the pass, with the given metrics."""
    updates = self.variables.get(UPDATES, {})
    return Aux(states.collections(self.variables), updates, metrics)


def observed(ledger: cost.Ledger, variables: Tree) -> Metrics:
  """Returns the statistics that modules sowed, and the open fractions of gates and nested gates."""
  stats = tree.named(variables.get('stats', {}))
  fractions = cost.open_fractions(ledger, gate_activity(variables))
  return stats | {f'{GATES}{path}': value for path, value in fractions.items()}


@dataclasses.dataclass(frozen=True)
class Objective:
  """The training loss of a model with a weight method.

  Attributes:
    model: the model.
    method: the weight method.
    budget: the budget controller, or `None`.
    distillation: weight and temperature of the teacher's loss, or `None`.
    steps: number of optimizer steps of the run, for modules with a schedule.
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
  ) -> tuple[Array, Aux]:
    """Returns the scalar to minimise, and auxiliary outputs.

    It is the sum of the mean loss per token in nats (over the last layer and early exits, including a
    teacher's divergence), the `losses` that modules sowed, the weight method's penalty, the budget's
    penalty and the loss of sampled policies.

    Args:
      effective: the effective parameters, with respect to which the loss is differentiated.
      state: state of the step; its trainable tree is not read.
      model_state: the model's collections besides the parameters, before this pass.
      batch: the batch.
      key: key of dropout and sampled gates.
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
      # Without a key, gates act greedily; this pass is the self-critical baseline.
      predicted, of_greedy = forward(rngs={'dropout': key})
      _, losses = cross_entropy(jax.lax.stop_gradient(predicted), batch.tokens_BxL1[:, 1:])
      greedy = _Pass(losses.nats, of_greedy)
      auxiliary += self._policy_loss(state, charged_density, activity, sampled, greedy)
    metrics['auxiliary'] = auxiliary
    return loss + auxiliary, sampled.aux(metrics)

  def learned(
    self,
    predicted: Readout | Array,
    exits: list[tuple[Readout | Array, Array]],
    batch: Batch,
  ) -> tuple[Array, Losses, Metrics]:
    """Returns the loss on the text and, if there is a teacher, on its predictions.

    The cross-entropy of the last layer has weight 1, and each early exit has its own weight. The loss is
    their weighted mean, mixed with the divergence from the teacher.

    Args:
      predicted: `Readout` or logits of the last layer.
      exits: `Readout` or logits of each early exit, with its weight.
      batch: the batch.

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
    """Returns the densities to charge, by path: the final ones, unless a density is learned."""
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
    """Returns the loss of REINFORCE, with the greedy pass as baseline."""
    shares = jax.tree.map(jnp.zeros_like, activity)
    if self.budget:
      fraction, shares = jax.value_and_grad(lambda a: self.costs.fraction(charged_density, a))(
        activity
      )
      price = self.budget.price(state.control, fraction)
      # The gradient of a mean over tokens, times their number, is the cost of opening per token.
      shares = jax.tree.map(lambda share: price * share * share.size, shares)
    policies = [policy.actions(found.variables) for found in (sampled, greedy)]
    rewards = [
      policy.reward(found.losses_BxL, policies_of, shares)
      for found, policies_of in zip((sampled, greedy), policies)
    ]
    return policy.loss(policies[0], *rewards, ENTROPY_BONUS)
