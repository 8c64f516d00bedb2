"""What every weight method shares: the state and the protocol.

A weight method decides which connections exist. It is a frozen dataclass in a file of its own under
`methods/weight/`; a field with a default is a config key, `total_steps` and the model's `groups` are
what the trainer supplies.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import tree
from sparse_lm.core.groups import Group
from sparse_lm.core.ranges import supplied
from sparse_lm.core.units import Pattern
from sparse_lm.kernels.topk import count
from sparse_lm.patterns import pattern

Array = jax.Array
Tree = Any


class Sparse(struct.PyTreeNode):
  """Which connections exist.

  Attributes:
    masks: like the parameters, bool, `None` = dense.
    target: like the parameters, the final density as float32 scalars, `None` = never pruned.
    extra: whatever else a method keeps from step to step.
  """

  masks: Tree
  target: Tree
  extra: Tree = None


class MaskUpdate(struct.PyTreeNode):
  """What an update of the connections did.

  Attributes:
    toggled: bool like the parameters, `None` = dense: weights that were dropped or set to zero. Their
      moments and averages start again.
  """

  trainable: Tree
  sparse: Sparse
  toggled: Tree


def restrict_to(leaves: Tree, like: Tree) -> Tree:
  """The leaves where `like` has one, `None` elsewhere."""
  return tree.where_sparse(lambda leaf, _: leaf, leaves, like, dense=lambda _: None)


def apply_masks(params: Tree, masks: Tree) -> Tree:
  """Parameters with exact zeros outside the masks."""
  return tree.where_sparse(
    lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, masks, dense=lambda w: w
  )


def exchange_masks(
  trainable: Tree, sparse: Sparse, masks: Tree, survived: Tree | None = None
) -> MaskUpdate:
  """The change from `sparse.masks` to `masks`.

  Connections of both masks keep their values, or those in `survived` alone, where that is given. All
  other weights become zero.
  """
  params = trainable['params']
  if survived is None:
    survived = jax.tree.map(jnp.logical_and, sparse.masks, masks)
  changed = tree.where_sparse(
    lambda w, old, new, kept: (old | new) & ~kept,
    params,
    sparse.masks,
    masks,
    survived,
    dense=lambda w: None,
  )
  masked = trainable | {'params': apply_masks(params, survived)}
  return MaskUpdate(masked, sparse.replace(masks=masks), changed)


@dataclasses.dataclass(frozen=True)
class WeightMethod:
  """The protocol, with the behaviour of a fixed mask.

  `trainable` is `{'params': model parameters, 'learned': the method's own}`. All but `due` and
  `dense_gradient` are pure functions that run inside jit.

  Attributes:
    total_steps: optimizer steps of the whole run.
    groups: units that span matrices, as the model declares them.
    needs: signals that `update` reads, trees like the parameters: 'grads', the dense gradient at the
      effective ones; of a kernel's inputs on calibration text 'x_sq', the mean squares `[in]`, and
      'xtx', the mean outer product `[in, in]`.
    one_shot: whether it prunes trained models too (`python -m sparse_lm.prune`).
    exact_density: whether the target is met to the weight.
    replaces_step: whether the optimizer rests in a step that updates the connections.
    masked: whether any weight is ever dropped.
    takes_masks: whether a run that starts from a sparse one keeps that one's masks.
    keeps_dense: whether dropped weights live on as dense weights (straight-through methods).
    controlled: whether the budget controller moves its density.
    learned_rate: learning rate of what it learns besides the weights, over theirs; without decay.
  """

  total_steps: int
  groups: tuple[Group, ...] = supplied(())
  needs: ClassVar[tuple[str, ...]] = ()
  exact_density: ClassVar[bool] = True
  replaces_step: ClassVar[bool] = False
  masked: ClassVar[bool] = True
  takes_masks: ClassVar[bool] = False
  keeps_dense: ClassVar[bool] = False
  controlled: ClassVar[bool] = False
  one_shot: ClassVar[bool] = False
  learned_rate: ClassVar[float] = 1.0

  @property
  def units(self) -> Pattern:
    """What is kept or dropped as a whole: the units of the method's `pattern`, if it has the field."""
    return pattern(getattr(self, 'pattern', 'unstructured'), self.groups)

  def check(self) -> None:
    """Raises UserError where fields do not fit each other, before anything is compiled."""

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """The trainable tree and the sparse state at step 0."""
    raise NotImplementedError(type(self).__name__)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """The parameters that the model sees, and the fraction of each prunable leaf that runs.

    Fractions are float32 scalars, `None` = dense; of learned masks they are differentiable.
    """
    return apply_masks(trainable['params'], sparse.masks), densities(sparse.masks)

  def penalty(self, density: Array) -> Array:
    """What is added to the loss where `density` of the prunable weights runs."""
    return jnp.float32(0)

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Re-masks after an optimizer update: moments, decay and EMA would wake dead weights."""
    if self.keeps_dense:
      return trainable
    return trainable | {'params': apply_masks(trainable['params'], sparse.masks)}

  def due(self, step: int) -> bool:
    """Whether `update` runs in this step (on the host)."""
    return False

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Changes the connections."""
    raise NotImplementedError(type(self).__name__)

  def density(self, target: float, step: int) -> float:
    """Density that a leaf with this final density has at `step`, for the cost ledger (on the host)."""
    return target

  def dense_gradient(self, step: int) -> bool:
    """Whether this step needs the gradient of dropped weights too, for the cost ledger (on the host)."""
    return 'grads' in self.needs and self.due(step)

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """The parameters and masks that are packed, reported and fine-tuned."""
    return apply_masks(trainable['params'], sparse.masks), sparse.masks


def densities(masks: Tree) -> Tree:
  """The fraction that each mask keeps, float32; exact below 2**24 weights."""
  return jax.tree.map(lambda mask: count(mask).astype(jnp.float32) / mask.size, masks)


def mean_density(density: Tree, params: Tree) -> Array:
  """The fraction over all leaves that have one, float32; 1 where none has."""
  sizes = {path: leaf.size for path, leaf in tree.named(params).items()}
  fractions = tree.named(density)
  total = sum(sizes[path] for path in fractions)
  if not total:
    return jnp.float32(1)
  return sum((sizes[path] / total * fraction for path, fraction in fractions.items()), 0.0)
