"""The training state: its fields, its initial value and its invariants."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import rng, tree
from sparse_lm.core.tree import Tree
from sparse_lm.layers.sow import SOWN
from sparse_lm.model.lm import LM
from sparse_lm.train import rounding
from sparse_lm.train.control import Budget, Control
from sparse_lm.train.optim import Optimizer
from sparse_lm.weights import parts
from sparse_lm.weights.collect import Collected
from sparse_lm.weights.method import Sparse, WeightMethod, densities


class TrainState(struct.PyTreeNode):
  """The training state.

  Attributes:
    step: int32, number of completed optimizer steps.
    trainable: `{'params': parameters of the model, 'learned': parameters of the weight method}`. The
      parameters are in the dtype of `config.model.weights_dtype`.
    sparse: masks, target densities and other state of the weight method.
    opt_state: the optimizer's state for `trainable`.
    ema: moving average of `trainable`, float32, or `None`.
    model_state: the model's collections besides the parameters (running thresholds, router biases).
    control: state of the budget controller, or `None`.
    key: key of the run's random numbers; each step folds in its number.
    signals: signals that the weight method collects over several steps, by its parts.
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
    """The trainable tree for evaluation and export: the moving average, if there is one."""
    return self.trainable if self.ema is None else rounding.like(self.ema, self.trainable)


class Start(NamedTuple):
  """A trained model from which a run starts.

  Attributes:
    params: its parameters, with zeros for dropped weights.
    masks: its masks, if the run keeps them; else `None`.
    model_state: its collections besides the parameters.
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
  """Returns the state at step 0. This is a pure function, which can be compiled and vmapped.

  Args:
    model: the model.
    method: the weight method.
    optimizer: the optimizer.
    budget: the budget controller, or `None`.
    seed: seed of the run; may be traced.
    target: tree of final densities, float32; `None` for dense leaves.
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
  """Returns `state`, which is at step 0, with the weights and optionally the masks of a trained model."""
  target = state.sparse.target
  params = rounding.like(start.params, state.trainable['params'])
  trainable, sparse = method.init(rng.stream(seed, 'masks'), params, target)
  if start.masks is not None:
    given = tree.where_sparse(
      lambda w, _, mask: jnp.ones(w.shape, bool) if mask is None else mask,
      start.params,
      target,
      start.masks,
      dense=lambda _: None,
    )
    sparse = sparse.replace(masks=given, target=densities(given))
    trainable = trainable | {'params': params}
  # Router biases are taken over only if the routers are of the same kind.
  theirs, fresh = (jax.tree.map(jnp.shape, s) for s in (start.model_state, state.model_state))
  same = {name for name in fresh if theirs.get(name) == fresh[name]}
  started = state.replace(
    trainable=trainable,
    sparse=sparse,
    opt_state=optimizer.transform().init(trainable),
    ema=first_average(optimizer, trainable),
    model_state=state.model_state | {name: start.model_state[name] for name in same},
  )
  # Steps donate their state, so it must not share buffers with the parent or contain a buffer twice.
  return jax.tree.map(jnp.copy, started)


def first_average(optimizer: Optimizer, trainable: Tree) -> Tree:
  """Returns the initial moving average, `trainable` in float32; `None` without an average."""
  return rounding.in_float32(trainable) if optimizer.ema else None


def check_masks(method: WeightMethod, state: TrainState) -> None:
  """Raises a ValueError if a dropped weight is not zero, because the masks would then be wrong."""
  for name, trees in (('trainable', state.trainable), ('ema', state.ema)):
    for path, found in tree.named({} if trees is None else _awake(trees, state.sparse)).items():
      if found:
        raise ValueError(
          f'{found} dropped weights of {path} ({name}) are not zero at step {state.step}: '
          f'{type(method).__name__}.constrain must keep them at zero'
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
  """Returns the collections that persist between steps, without the parameters."""
  return {name: value for name, value in variables.items() if name not in ('params', *SOWN)}
