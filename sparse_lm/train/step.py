"""The compiled steps of a run.

`effective` runs through `jax.vjp` and the loss is differentiated at the *effective* parameters. That
gradient is the dense one that growth and saliency need; pulled back through `effective` it is what
the optimizer gets (masked, straight-through or soft, by the method's own rule). One backward pass,
and no branch on a method.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.layers.record import SOWN
from sparse_lm.model import lm
from sparse_lm.model.lm import LM
from sparse_lm.plan import cost
from sparse_lm.train import loss, states
from sparse_lm.train.control import Budget
from sparse_lm.train.loss import Metrics
from sparse_lm.train.optim import Optimizer, as_float32, lost_updates, zero_moments
from sparse_lm.train.states import TrainState
from sparse_lm.weights.method import WeightMethod

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled. Two runs that differ in seed or sparsity alone share one, and its executables.

  Attributes:
    accumulation: microbatches of a step.
    budget: holds the gates at a target, or `None`.
    distillation: how a teacher's logits count, or `None`.
  """

  model: LM
  method: WeightMethod
  optimizer: Optimizer
  accumulation: int = 1
  budget: Budget | None = None
  distillation: loss.Distillation | None = None

  @functools.cached_property
  def tx(self) -> optax.GradientTransformation:
    """The optimizer's transformation."""
    return self.optimizer.transform()

  @functools.cached_property
  def init(self) -> Any:
    """`(seed, target) -> TrainState`."""
    return jax.jit(lambda seed, target: states.create(self, seed, target))

  @functools.cached_property
  def train_step(self) -> Any:
    """`(state, tokens_BxL+1, teacher's logits or None) -> (state, metrics)`; the state is donated."""
    return jax.jit(functools.partial(self.transition, update_masks=False), donate_argnums=0)

  @functools.cached_property
  def mask_update_step(self) -> Any:
    """The same for the steps in which the method's `update` is due: selection stays out of the rest."""
    return jax.jit(functools.partial(self.transition, update_masks=True), donate_argnums=0)

  @functools.cached_property
  def eval_step(self) -> Any:
    """`(params, model_state, tokens_BxL+1, weight_BxL) -> (summed nats, observations)`, float32."""
    return jax.jit(self._eval)

  @functools.cached_property
  def finalize(self) -> Any:
    """`state -> (params, masks)` as evaluated, reported and exported."""
    return jax.jit(lambda s: self.method.finalize(s.evaluated, s.sparse, s.step))

  def step(self, step: int) -> Any:
    """The compiled step for optimizer step `step`."""
    return self.mask_update_step if self.method.due(step) else self.train_step

  @functools.cached_property
  def costs(self) -> tuple[cost.Ledger, float]:
    """The ledger, and the forward FLOPs of the dense twin."""
    return self.ledger, cost.forward_flops(self.twin_costs, {})

  @functools.cached_property
  def ledger(self) -> cost.Ledger:
    """Every matmul of a forward pass over the context, in FLOPs per token."""
    return lm.ledger(self.model, self.model.spec.context)

  @functools.cached_property
  def twin_costs(self) -> cost.Ledger:
    """The ledger of the dense twin."""
    return lm.ledger(lm.twin(self.model), self.model.spec.context)

  @functools.cached_property
  def training_costs(self) -> cost.Ledger:
    """The ledger of a training step's forward pass, in FLOPs per token.

    One rule holds for all gates, learned, random or top-k: a training step computes what they close and
    multiplies it by zero, so nothing is left out for them. Routers of fixed capacity gather tokens, and
    what they leave out is not in the ledger.
    """
    return cost.ungated(lm.ledger(self.model, self.model.spec.context, mode='train'))

  @functools.cached_property
  def forward_passes(self) -> float:
    """Forward passes of a training step; a part of one where a part is computed again."""
    # A sampled policy's baseline is a second forward pass, without draws.
    return 1 + lm.samples(self.model) + lm.recomputed(self.model, self.model.spec.context)

  def pass_flops(self, density: Tree) -> Any:
    """FLOPs per token of a training step's forward pass, kernels at the `density` of that step.

    A density that is learned is a gate on weights, and gates leave nothing out.
    """
    held = {} if self.method.controlled else tree.named(density)
    return cost.forward_flops(self.training_costs, held)

  def step_flops(self, step: int, forward: float) -> float:
    """FLOPs per token of optimizer step `step`, whose forward pass takes `forward`; no teacher's."""
    dense = self.pass_flops({}) if self.method.dense_gradient(step) else None
    return cost.training_flops(forward, dense, self.forward_passes)

  def fraction(self, density: Tree, activity: dict[str, Array]) -> Array:
    """Forward FLOPs over the dense twin's: kernels at `density`, gates as they sowed `activity`."""
    ledger, dense = self.costs
    measured = cost.fractions(ledger, activity)
    return cost.forward_flops(ledger, tree.named(density), measured) / dense

  def _eval(
    self, params: Tree, model_state: Tree, tokens_BxL1: Array, weight_BxL: Array
  ) -> tuple[Array, Metrics]:
    logits, variables = self.model.apply(
      {'params': params, **model_state}, tokens_BxL1[:, :-1], mode='eval', mutable=SOWN
    )
    nats = jnp.sum(loss.token_losses(logits, tokens_BxL1[:, 1:]) * weight_BxL)
    return nats, loss.observed(self, variables)

  def _loss(
    self, seen: loss.Seen, state: TrainState, model_state: Tree, batch: loss.Batch, key: Array
  ) -> tuple[Array, tuple[Tree, Metrics]]:
    return loss.loss(self, seen, state, model_state, batch, key)

  def _gradients(
    self, seen: loss.Seen, state: TrainState, batch: loss.Batch, key: Array
  ) -> tuple[loss.Seen, Tree, Metrics]:
    """Gradient at what the model sees, averaged over the microbatches."""
    gradient = jax.grad(self._loss, has_aux=True)
    if self.accumulation == 1:
      grads, (model_state, metrics) = gradient(seen, state, state.model_state, batch, key)
      return grads, model_state, metrics

    def microbatch(carry: tuple[Tree, Tree], x: tuple[Array, Array]):
      total, model_state = carry
      grads, (model_state, metrics) = gradient(seen, state, model_state, *x)
      return (jax.tree.map(jnp.add, total, grads), model_state), metrics

    batches = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
    # Sums of bfloat16 gradients lose what a microbatch adds; each is rounded once, at the end.
    zeros = as_float32(jax.tree.map(jnp.zeros_like, seen))
    (total, model_state), metrics = jax.lax.scan(
      microbatch, (zeros, state.model_state), (batches, jax.random.split(key, self.accumulation))
    )
    mean = jax.tree.map(lambda g, s: (g / self.accumulation).astype(s.dtype), total, seen)
    return mean, model_state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

  def transition(
    self,
    state: TrainState,
    tokens_BxL1: Array,
    teacher_BxLxV: Array | None = None,
    *,
    update_masks: bool,
  ) -> tuple[TrainState, Metrics]:
    """One optimizer step, uncompiled.

    With `update_masks` the method's `update` follows the optimizer's update, or replaces it.
    """
    method, step = self.method, state.step
    key_mask, key_model, key_update = jax.random.split(jax.random.fold_in(state.key, step), 3)
    seen, pull_back = jax.vjp(
      lambda t: method.effective(t, state.sparse, 'train', step, key_mask), state.trainable
    )
    grads, model_state, metrics = self._gradients(
      seen, state, (tokens_BxL1, teacher_BxLxV), key_model
    )
    (trainable_grads,) = pull_back(grads)
    metrics['gradient_norm'] = optax.tree.norm(as_float32(trainable_grads))
    control = state.control
    if control is not None:
      control = self.budget.update(control, metrics['flops_fraction'])
      metrics |= {'budget/price': control.price, 'budget/measured': control.measured}

    trainable, sparse, opt_state = state.trainable, state.sparse, state.opt_state
    changed = jax.tree.map(lambda x: None, trainable)
    if not (update_masks and method.replaces_step):
      updates, opt_state = self.tx.update(trainable_grads, opt_state, trainable)
      if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(trainable)):
        metrics['lost_updates'] = lost_updates(trainable, updates)
      trainable = method.constrain(optax.apply_updates(trainable, updates), sparse)
    if update_masks:
      change = method.update(trainable, sparse, {'grads': grads[0]}, step, key_update)
      trainable, sparse = change.trainable, change.sparse
      changed = changed | {'params': change.toggled}
      opt_state = zero_moments(self.tx, opt_state, changed)
    return (
      state.replace(
        step=step + 1,
        trainable=trainable,
        sparse=sparse,
        opt_state=opt_state,
        ema=self._average(state.ema, trainable, sparse, changed),
        model_state=model_state,
        control=control,
      ),
      metrics,
    )

  def _average(self, ema: Tree, trainable: Tree, sparse: Any, changed: Tree) -> Tree:
    """The moving average after a step; that of `changed` weights (bool, `None` = dense) starts at 0."""
    if ema is None:
      return None
    mixed = optax.incremental_update(as_float32(trainable), ema, 1 - self.optimizer.ema)
    mixed = tree.where_sparse(
      lambda w, flag: jnp.where(flag, 0, w), mixed, changed, dense=lambda w: w
    )
    return self.method.constrain(mixed, sparse)


@functools.lru_cache(maxsize=16)
def shared(program: Program) -> Program:
  """The one program equal to `program`, with what it has compiled so far."""
  return program
