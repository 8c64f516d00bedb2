"""What a run is at a step."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import rng, tree
from sparse_lm.core.tree import Tree
from sparse_lm.layers.record import SOWN
from sparse_lm.train.control import Control
from sparse_lm.train.optim import as_float32
from sparse_lm.weights.method import Sparse, densities


class TrainState(struct.PyTreeNode):
  """Everything that a step reads and writes.

  Attributes:
    step: int32, optimizer steps completed.
    trainable: `{'params': of the model, 'learned': of the weight method}`.
    sparse: masks, targets and what else the weight method keeps.
    opt_state: of the optimizer, over `trainable`.
    ema: moving average of `trainable` in float32, or `None`.
    model_state: Flax collections that are not parameters (running thresholds, balance biases).
    control: of the budget controller, or `None`.
    key: of the run's draws; a step folds its number in.
  """

  step: jax.Array
  trainable: Tree
  sparse: Sparse
  opt_state: Tree
  ema: Tree
  model_state: Tree
  control: Control | None
  key: jax.Array

  @property
  def evaluated(self) -> Tree:
    """The trainable tree that evaluation and export use, in the dtypes of `trainable`."""
    if self.ema is None:
      return self.trainable
    return jax.tree.map(lambda mean, p: mean.astype(p.dtype), self.ema, self.trainable)


def first_average(program: Any, trainable: Tree) -> Tree:
  """The moving average of a run that starts from `trainable`: float32, or `None` without one."""
  return as_float32(trainable) if program.optimizer.ema else None


def restart(program: Any, seed: int, state: TrainState, parent: Any, masks: Tree) -> TrainState:
  """`state`, at step 0, with the weights of a trained `parent` and, if given, its masks."""
  target = state.sparse.target
  trainable, sparse = program.method.init(rng.stream(seed, 'masks'), parent.params, target)
  if masks is not None:
    given = tree.where_sparse(
      lambda w, _, mask: jnp.ones(w.shape, bool) if mask is None else mask,
      parent.params,
      target,
      masks,
      dense=lambda _: None,
    )
    sparse = sparse.replace(masks=given, target=densities(given))
    trainable = trainable | {'params': parent.params}
  # A parent's thresholds and biases are its routers'; another kind of router starts its own.
  theirs, fresh = (jax.tree.map(jnp.shape, s) for s in (parent.model_state, state.model_state))
  started = state.replace(
    trainable=trainable,
    sparse=sparse,
    opt_state=program.tx.init(trainable),
    ema=first_average(program, trainable),
    model_state=parent.model_state if theirs == fresh else state.model_state,
  )
  # Steps donate their state: no buffer of it may be the parent's, or in it twice.
  return jax.tree.map(jnp.copy, started)


def check_masks(program: Any, state: TrainState) -> None:
  """Raises ValueError where weights outside the masks are not zero: the sparsity is not the masks'."""
  if program.method.keeps_dense:
    return
  for name in ('trainable', 'ema'):
    held = getattr(state, name)
    for path, found in tree.named({} if held is None else _awake(held, state.sparse)).items():
      if found:
        raise ValueError(
          f'{found} dropped weights of {path} ({name}) are not zero at step {state.step}: '
          f'{type(program.method).__name__}.constrain let them wake'
        )


def _awake(trainable: Tree, sparse: Sparse) -> Tree:
  counts = tree.where_sparse(
    lambda w, mask: jnp.sum((w != 0) & ~mask),
    trainable['params'],
    sparse.masks,
    dense=lambda _: None,
  )
  return jax.device_get(counts)


def collections(variables: dict[str, Any]) -> dict[str, Any]:
  """The collections of `variables` that live from step to step, besides the parameters."""
  return {name: value for name, value in variables.items() if name not in ('params', *SOWN)}


def create(program: Any, seed: int, target: Tree) -> TrainState:
  """The state at step 0 (see `step.Program`); pure, so that it is jitted as a whole."""
  tokens = jnp.zeros((1, program.model.spec.context), jnp.int32)
  variables = program.model.init(rng.stream(seed, 'init'), tokens, mode='eval')
  trainable, sparse = program.method.init(rng.stream(seed, 'masks'), variables['params'], target)
  return TrainState(
    step=jnp.int32(0),
    trainable=trainable,
    sparse=sparse,
    opt_state=program.tx.init(trainable),
    ema=first_average(program, trainable),
    model_state=collections(variables),
    control=program.budget and program.budget.init(),
    key=rng.stream(seed, 'steps'),
  )
