"""The compiled steps of a run.

The weight method's `effective` runs through `jax.vjp`, and the loss is differentiated at the
*effective* parameters. This dense gradient serves growth (RigL) and saliency. Pulled back through
`effective`, it becomes the optimizer's gradient: masked, straight-through or soft, as the method
defines it. So there is a single backward pass and no branch on the method.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.stages import Wrapped

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.kernels import device
from sparse_lm.kernels.cross_entropy import Readout
from sparse_lm.layers.after_step import updated
from sparse_lm.model.lm import LM
from sparse_lm.train import rounding, states
from sparse_lm.train.objective import Batch, EffectiveParams, Metrics, Objective
from sparse_lm.train.on_host import OnHost, host_device, no_garbage_collected
from sparse_lm.train.optim import (
  Optimizer,
  update_unless_resting,
  zero_moments,
)
from sparse_lm.train.pass_costs import PassCosts
from sparse_lm.train.states import TrainState
from sparse_lm.weights import checks, collect, parts
from sparse_lm.weights.collect import Collected, Gradients
from sparse_lm.weights.method import Sparse, WeightMethod, apply_masks

Array = jax.Array
# The parts of the weight method that update their masks in a step, and the parts that collect signals.
Updates = tuple[tuple[str, ...], tuple[str, ...]]
# Folded into the key for random numbers before step 0. All step numbers are smaller.
AT_START = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to compile. Runs that differ only in seed or sparsity share a program and its executables.

  Attributes:
    objective: the loss, with the model and the weight method.
    optimizer: the optimizer.
    accumulation: number of microbatches per step.
  """

  objective: Objective
  optimizer: Optimizer
  accumulation: int = 1

  @property
  def model(self) -> LM:
    """The model that the objective trains."""
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

  @property
  def create(self) -> Callable[[int, Tree], TrainState]:
    """`(seed, target) -> TrainState`, uncompiled."""
    return functools.partial(
      states.create, self.model, self.method, self.optimizer, self.objective.budget
    )

  @functools.cached_property
  def init(self) -> OnHost:
    """`(seed, target) -> TrainState`."""
    return OnHost(self.create)

  def begin(self, seed: int, target: Tree, batch: tuple[int, int]) -> TrainState:
    """Does the same as `init`; on an accelerator, it compiles the first steps at the same time.

    Args:
      seed: seed of the run.
      target: final densities.
      batch: shape of a step's tokens, `(B, L + 1)`.
    """
    device = jax.local_devices()[0]
    if device == host_device():
      return self.init(seed, target)
    with concurrent.futures.ThreadPoolExecutor() as pool, no_garbage_collected():
      outputs, state = self.init.later(pool, seed, target)
      # The state will be committed to the device. The shape structs must be, too, or JAX would compile
      # each step again. Tokens come from the host.
      place = jax.sharding.SingleDeviceSharding(device)
      shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), outputs
      )
      tokens = jax.ShapeDtypeStruct(batch, jnp.int32)
      compiled = []
      for step in dict.fromkeys([self.step(0), self.step(1)]):
        compiled.append(pool.submit(step.lower(shapes, tokens, None).compile))
      compiled.append(pool.submit(self.finalize.lower(shapes).compile))
      for one in compiled:
        one.result()
      return state.result()

  @functools.cached_property
  def _compiled(self) -> dict[Updates, Wrapped]:
    return {}

  def compiled(self, updates: tuple[str, ...] = (), collects: tuple[str, ...] = ()) -> Wrapped:
    """Returns the compiled `transition`: `(state, tokens_BxL1, teacher) -> (state, metrics)`.

    It donates the state. Each combination of parts that update their masks has its own executable, so
    steps without mask updates contain no selection.
    """
    key = updates, collects
    if key not in self._compiled:
      step = functools.partial(self.transition, updates=updates, collects=collects)
      options = device.compiler_options()
      self._compiled[key] = jax.jit(step, donate_argnums=0, compiler_options=options)
    return self._compiled[key]

  @property
  def train_step(self) -> Wrapped:
    """The compiled step without mask updates."""
    return self.compiled()

  @property
  def mask_update_step(self) -> Wrapped:
    """The compiled step that updates all masks."""
    return self.compiled(tuple(self.method.parts), parts.spanning_steps(self.method))

  @functools.cached_property
  def collect_at_start(self) -> Wrapped:
    """The compiled `add_at_start`; `names` is static."""
    return jax.jit(self.add_at_start, static_argnums=5)

  @functools.cached_property
  def update_at_start(self) -> Wrapped:
    """The compiled `transition_at_start`; it donates the state."""
    return jax.jit(self.transition_at_start, donate_argnums=0)

  @functools.cached_property
  def finalize(self) -> Wrapped:
    """`state -> (params, masks)` as they are evaluated, reported and exported."""
    return jax.jit(lambda s: self.method.finalize(s.evaluated, s.sparse, s.step))

  @functools.cached_property
  def non_finite(self) -> Wrapped:
    """`state -> flags by path`: `WeightMethod.non_finite` of the scores that `finalize` ranks."""
    return jax.jit(lambda s: self.method.non_finite(s.evaluated, s.sparse, s.step))

  def step(self, step: int) -> Wrapped:
    """Returns the compiled step for optimizer step `step`."""
    return self.compiled(*self.updates(step))

  def updates(self, step: int) -> Updates:
    """Returns the parts that update masks in optimizer step `step`, and those that collect signals."""
    return parts.due(self.method, step), parts.collecting(self.method, step)

  def step_flops(self, step: int, forward: float, target: dict[str, float]) -> float:
    """Returns the FLOPs per token of optimizer step `step`, without a teacher.

    Args:
      step: number of the step.
      forward: FLOPs per token of its forward pass.
      target: final densities by path.
    """
    backward = parts.backward_densities(self.method, target, step)
    weight_gradient = None if backward is None else self.costs.training_pass(backward)
    return self.costs.training_step(forward, weight_gradient)

  def start_flops(self, target: dict[str, float]) -> float:
    """Returns the FLOPs per token of a batch for pruning before step 0, without a teacher.

    Parameters that are pruned then are still dense in the forward pass and in the gradient.

    Args:
      target: final densities by path.
    """
    pruned = parts.at_start(self.method)
    dense = {path: 1.0 for path in target if self.method.owner(path) in pruned}
    forward = parts.densities(self.method, target, 0) | dense
    backward = (parts.backward_densities(self.method, target, 0) or forward) | dense
    return self.costs.training_step(
      self.costs.training_pass(forward), self.costs.training_pass(backward)
    )

  def _effective(
    self, state: TrainState, key: Array
  ) -> tuple[EffectiveParams, Callable[[EffectiveParams], tuple[Tree]]]:
    """Returns the effective parameters and a function that pulls gradients back to `trainable`."""

    def apply(trainable: Tree) -> EffectiveParams:
      seen, density = self.method.effective(trainable, state.sparse, 'train', state.step, key)
      return EffectiveParams(seen, density, self.method.penalty(trainable, state.sparse, density))

    return jax.vjp(apply, state.trainable)

  def _gradients(
    self, effective: EffectiveParams, state: TrainState, batch: Batch, key: Array
  ) -> tuple[EffectiveParams, Tree, Metrics]:
    """Returns the gradient at the effective parameters, the model's collections, and the metrics.

    The gradient is averaged over the microbatches.
    """
    gradient = jax.grad(self.objective.loss, has_aux=True)
    if self.accumulation == 1:
      grads, aux = gradient(effective, state, state.model_state, batch, key)
      return grads, updated(aux.model_state, aux.updates), aux.metrics

    def microbatch(
      carry: tuple[Tree, Tree], x: tuple[Batch, Array]
    ) -> tuple[tuple[Tree, Tree], Metrics]:
      total, model_state = carry
      part, key = x
      part = part.with_head_of(batch)
      grads, aux = gradient(effective, state, model_state, part, key)
      total = jax.tree.map(jnp.add, total, grads)
      return (total, aux.model_state), (aux.updates, aux.metrics)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), effective)
    (total, model_state), (updates, metrics) = jax.lax.scan(
      microbatch,
      (zeros, state.model_state),
      (batch.microbatches(self.accumulation), jax.random.split(key, self.accumulation)),
    )
    mean = rounding.like(jax.tree.map(lambda g: g / self.accumulation, total), effective)
    model_state = updated(model_state, jax.tree.map(lambda u: jnp.sum(u, axis=0), updates))
    return mean, model_state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

  def transition(
    self,
    state: TrainState,
    tokens_BxL1: Array,
    teacher: Readout | Array | None = None,
    *,
    updates: tuple[str, ...] = (),
    collects: tuple[str, ...] = (),
  ) -> tuple[TrainState, Metrics]:
    """Runs one optimizer step, uncompiled; returns the new state and metrics.

    Args:
      state: the state.
      tokens_BxL1: int32 tokens `[B, L + 1]`.
      teacher: as in `Batch`.
      updates: parts of the weight method that update their masks, after or instead of an optimizer step.
      collects: parts that add the step's gradient to signals over several steps.
    """
    method, step = self.method, state.step
    key_mask, key_model, key_update = jax.random.split(jax.random.fold_in(state.key, step), 3)
    effective, pull_back = self._effective(state, key_mask)
    batch = Batch(tokens_BxL1, teacher)
    grads, model_state, metrics = self._gradients(effective, state, batch, key_model)
    trainable_grads = rounding.in_float32(*pull_back(grads))
    metrics['gradient_norm'] = optax.tree.norm(trainable_grads)
    if (control := state.control) is not None:
      control = self.objective.budget.update(control, metrics['flops_fraction'])
      metrics |= {'budget/price': control.price, 'budget/measured': control.measured}

    trainable, sparse, opt_state = state.trainable, state.sparse, state.opt_state
    resting, frozen = method.resting(updates, trainable), method.frozen(sparse)
    if not all(jax.tree.leaves(resting)):
      resting = resting | {'params': _resting_or_frozen(resting['params'], frozen)}
      factor = method.rate_factor(sparse.target, step)
      change, opt_state = update_unless_resting(
        self.tx, trainable_grads, opt_state, trainable, resting, factor
      )
      trainable = method.constrain(rounding.add_updates(trainable, change, key_update), sparse)
    read = Gradients(effective.params, grads.params)
    collected = parts.add(state.signals, read, collects)
    toggled = jax.tree.map(lambda x: None, trainable)
    if updates:
      signals = parts.signals(method, collected, read, sparse.target, updates)
      update = method.update_parts(updates, trainable, sparse, signals, step, key_update)
      trainable, sparse = update.trainable, update.sparse
      metrics |= checks.as_metrics(update.non_finite)
      toggled |= {'params': update.toggled}
      opt_state = zero_moments(self.tx, opt_state, toggled)
      collected = parts.forget(collected, updates)
    after = state.replace(
      step=step + 1,
      trainable=trainable,
      sparse=sparse,
      opt_state=opt_state,
      ema=self._average(state.ema, trainable, sparse, toggled, frozen),
      model_state=model_state,
      control=control,
      signals=collected,
    )
    return after, metrics

  def add_at_start(
    self,
    state: TrainState,
    collected: dict[str, Collected],
    tokens_BxL1: Array,
    teacher: Readout | Array | None,
    number: Array,
    names: tuple[str, ...],
  ) -> dict[str, Collected]:
    """Adds the signals of one batch, at the initial weights, to `collected`; uncompiled.

    Args:
      state: the state at step 0.
      collected: signals so far, by part of the weight method.
      tokens_BxL1: int32 tokens `[B, L + 1]`.
      teacher: as in `Batch`.
      number: number of the batch.
      names: parts of the weight method that use the batch.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, AT_START), number)
    key_mask, key_model = jax.random.split(key)
    effective, _ = self._effective(state, key_mask)
    batch = Batch(tokens_BxL1, teacher)
    grads, _, _ = self._gradients(effective, state, batch, key_model)
    return parts.add(collected, Gradients(effective.params, grads.params), names)

  def transition_at_start(
    self, state: TrainState, collected: dict[str, Collected]
  ) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
    """Updates the masks before step 0, uncompiled.

    Returns:
      The new state; for each parameter with signals, by path, whether all of them are zero (bool); and
      `MaskUpdate.non_finite`.
    """
    updates = tuple(parts.at_start(self.method))
    signals = {name: collect.means(collected[name]) for name in updates}
    key = jax.random.fold_in(state.key, AT_START)
    update = self.method.update_parts(
      updates, state.trainable, state.sparse, signals, state.step, key
    )
    silent: dict[str, Array] = {}
    for found in (found for needs in signals.values() for found in needs.values()):
      for path, values in tree.named(found).items():
        silent[path] = silent.get(path, True) & ~jnp.any(values != 0)
    ema = states.first_average(self.optimizer, update.trainable)
    after = state.replace(trainable=update.trainable, sparse=update.sparse, ema=ema)
    return after, silent, update.non_finite

  def _average(
    self, ema: Tree, trainable: Tree, sparse: Sparse, toggled: Tree, frozen: Tree
  ) -> Tree:
    """Returns the moving average after a step. It restarts at 0 where `toggled` (bool) is true."""
    if ema is None:
      return None
    new = rounding.in_float32(trainable)
    mixed = optax.incremental_update(new, ema, 1 - self.optimizer.ema)
    params = tree.where_sparse(
      lambda new, rests, old: jnp.where(rests, old, new),
      mixed['params'],
      frozen,
      ema['params'],
      dense=lambda new: new,
    )
    mixed = mixed | {'params': params}
    mixed = tree.where_sparse(
      lambda w, flag: jnp.where(flag, 0, w), mixed, toggled, dense=lambda w: w
    )
    return mixed | {'params': apply_masks(mixed['params'], sparse.masks)}


def _resting_or_frozen(resting: Tree, frozen: Tree) -> Tree:
  """Returns, for each leaf, True if the whole leaf rests, else the bools of its frozen weights."""
  return tree.where_sparse(
    lambda rests, weights: rests or weights, resting, frozen, dense=lambda rests: rests
  )


@functools.lru_cache(maxsize=16)
def shared(program: Program) -> Program:
  """Returns the cached program that equals `program`, with its executables."""
  return program
