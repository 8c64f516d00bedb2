"""Training state: what a step reads and writes, how it begins, and what must hold of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import rng, tree
from sparse_lm.core.tree import Tree
from sparse_lm.layers.sow import SOWN
from sparse_lm.model.lm import LM
from sparse_lm.train.control import Budget, Control
from sparse_lm.train.optim import Optimizer
from sparse_lm.weights import parts
from sparse_lm.weights.collect import Collected
from sparse_lm.weights.method import Sparse, WeightMethod, densities


class TrainState(struct.PyTreeNode):
  """Everything that a step reads and writes.

  Attributes:
    step: int32, optimizer steps completed.
    trainable: `{'params': of the model, 'learned': of the weight method}`, all float32.
    sparse: masks, targets and what else the weight method keeps.
    opt_state: of the optimizer, over `trainable`.
    ema: moving average of `trainable`, or `None`.
    model_state: Flax collections that are not parameters (running thresholds, balance biases).
    control: of the budget controller, or `None`.
    key: of the run's draws; a step folds its number in.
    signals: what the weight method collects over several steps, by its parts.
  """

  step: jax.Array
  trainable: Tree
  sparse: Sparse
  opt_state: Tree
  ema: Tree
  model_state: Tree
  control: Control | None
  key: jax.Array
  signals: dict[str, Collected]

  @property
  def evaluated(self) -> Tree:
    """The trainable tree that evaluation and export use: the moving average if there is one."""
    return self.trainable if self.ema is None else self.ema


class Start(NamedTuple):
  """A trained model that a run starts from.

  Attributes:
    params: with zeros where a weight was dropped.
    masks: like `params`, bool, where the run is to keep them; else `None`.
    model_state: its collections that are not parameters.
  """

  params: Tree
  masks: Tree
  model_state: Tree


def create(
  model: LM,
  method: WeightMethod,
  optimizer: Optimizer,
  budget: Budget | None,
  seed: int,
  target: Tree,
) -> TrainState:
  """The state at step 0; pure, so that it can be compiled and vmapped.

  Args:
    seed: of the run; may be traced.
    target: final densities like the parameters, float32, `None` = dense.
  """
  tokens = jnp.zeros((1, model.spec.context), jnp.int32)
  variables = model.init(rng.stream(seed, 'init'), tokens, mode='eval')
  trainable, sparse = method.init(rng.stream(seed, 'masks'), variables['params'], target)
  return TrainState(
    step=jnp.int32(0),
    trainable=trainable,
    sparse=sparse,
    opt_state=optimizer.transform().init(trainable),
    ema=first_average(optimizer, trainable),
    model_state=collections(variables),
    control=budget and budget.init(),
    key=rng.stream(seed, 'steps'),
    signals=parts.start_collecting(method, variables['params'], target),
  )


def restart(
  method: WeightMethod, optimizer: Optimizer, seed: int, state: TrainState, start: Start
) -> TrainState:
  """`state`, at step 0, with the weights of a trained model and, if given, its masks."""
  target = state.sparse.target
  trainable, sparse = method.init(rng.stream(seed, 'masks'), start.params, target)
  if start.masks is not None:
    given = tree.where_sparse(
      lambda w, _, mask: jnp.ones(w.shape, bool) if mask is None else mask,
      start.params,
      target,
      start.masks,
      dense=lambda _: None,
    )
    sparse = sparse.replace(masks=given, target=densities(given))
    trainable = trainable | {'params': start.params}
  # A parent's thresholds and biases are its routers'; another kind of router starts its own.
  theirs, fresh = (jax.tree.map(jnp.shape, s) for s in (start.model_state, state.model_state))
  started = state.replace(
    trainable=trainable,
    sparse=sparse,
    opt_state=optimizer.transform().init(trainable),
    ema=first_average(optimizer, trainable),
    model_state=start.model_state if theirs == fresh else state.model_state,
  )
  # Steps donate their state: no buffer of it may be the parent's, or in it twice.
  return jax.tree.map(jnp.copy, started)


def first_average(optimizer: Optimizer, trainable: Tree) -> Tree:
  """The moving average of a run that starts from `trainable`: float32, or `None` without one."""
  return trainable if optimizer.ema else None


def check_masks(method: WeightMethod, state: TrainState) -> None:
  """Raises ValueError where weights outside the masks are not zero: the sparsity is not the masks'."""
  for name, trees in (('trainable', state.trainable), ('ema', state.ema)):
    for path, found in tree.named({} if trees is None else _awake(trees, state.sparse)).items():
      if found:
        raise ValueError(
          f'{found} dropped weights of {path} ({name}) are not zero at step {state.step}: '
          f'{type(method).__name__}.constrain let them wake'
        )


def _awake(trainable: Tree, sparse: Sparse) -> Tree:
  counts = tree.where_sparse(
    lambda w, mask: jnp.sum((w != 0) & ~mask),
    trainable['params'],
    sparse.masks,
    dense=lambda _: None,
  )
  return jax.device_get(counts)


def collections(variables: dict[str, Tree]) -> dict[str, Tree]:
  """The collections of `variables` that live from step to step, besides the parameters."""
  return {name: value for name, value in variables.items() if name not in ('params', *SOWN)}
