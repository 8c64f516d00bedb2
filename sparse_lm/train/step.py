"""The compiled steps of a run.

`effective` runs through `jax.vjp` and the loss is differentiated at the *effective* parameters. That
gradient is the dense one that growth and saliency need; pulled back through `effective` it is what
the optimizer gets (masked, straight-through or soft, by the method's own rule). One backward pass,
and no branch on a method.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.model.lm import LM
from sparse_lm.train import states
from sparse_lm.train.objective import Batch, EffectiveParams, Metrics, Objective
from sparse_lm.train.optim import Optimizer, as_float32, lost_updates, zero_moments
from sparse_lm.train.pass_costs import PassCosts
from sparse_lm.train.states import TrainState
from sparse_lm.weights.method import Sparse, WeightMethod

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
  """What is compiled. Two runs that differ in seed or sparsity alone share one, and its executables.

  Attributes:
    objective: the loss, with the model and the weight method.
    accumulation: microbatches of a step.
  """

  objective: Objective
  optimizer: Optimizer
  accumulation: int = 1

  @property
  def model(self) -> LM:
    """The model."""
    return self.objective.model

  @property
  def method(self) -> WeightMethod:
    """The weight method."""
    return self.objective.method

  @property
  def costs(self) -> PassCosts:
    """FLOPs per token of the model's passes."""
    return self.objective.costs

  @functools.cached_property
  def tx(self) -> optax.GradientTransformation:
    """The optimizer's transformation."""
    return self.optimizer.transform()

  @functools.cached_property
  def init(self) -> Wrapped:
    """`(seed, target) -> TrainState`."""
    objective = self.objective
    return jax.jit(
      functools.partial(
        states.create, objective.model, objective.method, self.optimizer, objective.budget
      )
    )

  @functools.cached_property
  def train_step(self) -> Wrapped:
    """`(state, tokens_BxL+1, teacher's logits or None) -> (state, metrics)`; the state is donated."""
    return jax.jit(functools.partial(self.transition, update_masks=False), donate_argnums=0)

  @functools.cached_property
  def mask_update_step(self) -> Wrapped:
    """The same for the steps in which the method's `update` is due: selection stays out of the rest."""
    return jax.jit(functools.partial(self.transition, update_masks=True), donate_argnums=0)

  @functools.cached_property
  def finalize(self) -> Wrapped:
    """`state -> (params, masks)` as evaluated, reported and exported."""
    return jax.jit(lambda s: self.method.finalize(s.evaluated, s.sparse, s.step))

  def step(self, step: int) -> Wrapped:
    """The compiled step for optimizer step `step`."""
    return self.mask_update_step if self.method.due(step) else self.train_step

  def step_flops(self, step: int, forward: float) -> float:
    """FLOPs per token of optimizer step `step`, whose forward pass takes `forward`; no teacher's."""
    dense = self.costs.training_pass({}) if self.method.dense_gradient(step) else None
    return self.costs.training_step(forward, dense)

  def _gradients(
    self, effective: EffectiveParams, state: TrainState, batch: Batch, key: Array
  ) -> tuple[EffectiveParams, Tree, Metrics]:
    """Gradient at the effective parameters, averaged over the microbatches."""
    gradient = jax.grad(self.objective.loss, has_aux=True)
    if self.accumulation == 1:
      grads, (model_state, metrics) = gradient(effective, state, state.model_state, batch, key)
      return grads, model_state, metrics

    def microbatch(carry: tuple[Tree, Tree], x: tuple[Batch, Array]):
      total, model_state = carry
      grads, (model_state, metrics) = gradient(effective, state, model_state, *x)
      return (jax.tree.map(jnp.add, total, grads), model_state), metrics

    batches = jax.tree.map(lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]), batch)
    # Sums of bfloat16 gradients lose what a microbatch adds; each is rounded once, at the end.
    zeros = as_float32(jax.tree.map(jnp.zeros_like, effective))
    (total, model_state), metrics = jax.lax.scan(
      microbatch, (zeros, state.model_state), (batches, jax.random.split(key, self.accumulation))
    )
    mean = jax.tree.map(lambda g, s: (g / self.accumulation).astype(s.dtype), total, effective)
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
    effective, pull_back = jax.vjp(
      lambda t: EffectiveParams(*method.effective(t, state.sparse, 'train', step, key_mask)),
      state.trainable,
    )
    grads, model_state, metrics = self._gradients(
      effective, state, Batch(tokens_BxL1, teacher_BxLxV), key_model
    )
    (trainable_grads,) = pull_back(grads)
    metrics['gradient_norm'] = optax.tree.norm(as_float32(trainable_grads))
    control = state.control
    if control is not None:
      control = self.objective.budget.update(control, metrics['flops_fraction'])
      metrics |= {'budget/price': control.price, 'budget/measured': control.measured}

    trainable, sparse, opt_state = state.trainable, state.sparse, state.opt_state
    changed = jax.tree.map(lambda x: None, trainable)
    if not (update_masks and method.replaces_step):
      updates, opt_state = self.tx.update(trainable_grads, opt_state, trainable)
      if any(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(trainable)):
        metrics['lost_updates'] = lost_updates(trainable, updates)
      trainable = method.constrain(optax.apply_updates(trainable, updates), sparse)
    if update_masks:
      change = method.update(trainable, sparse, {'grads': grads.params}, step, key_update)
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

  def _average(self, ema: Tree, trainable: Tree, sparse: Sparse, changed: Tree) -> Tree:
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
