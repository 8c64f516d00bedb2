"""The protocol of weight methods, and their state.

A weight method decides which weights exist. It is a frozen dataclass in its own file in
`methods/weight/`. A field with a default is a config key. The trainer supplies `total_steps` and the
model's `groups`. A method that keeps the weights of largest score derives from `ScoredMethod` in
`weights/score.py` and defines only the score.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import tree
from sparse_lm.core.errors import require
from sparse_lm.core.groups import Group
from sparse_lm.core.ranges import supplied
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Pattern
from sparse_lm.kernels.topk import counts
from sparse_lm.patterns import pattern
from sparse_lm.signals import from_training
from sparse_lm.weights.traits import Traits

Array = jax.Array


class Sparse(struct.PyTreeNode):
  """The state of a weight method.

  Attributes:
    masks: tree of bools like the parameters; `None` means dense. If dropped weights go on learning, the
      method may store no masks.
    target: the final density of each parameter, a float32 scalar; `None` means never pruned.
    extra: other state of the method.
  """

  masks: Tree
  target: Tree
  extra: Tree = None


class MaskUpdate(struct.PyTreeNode):
  """The result of a mask update.

  Attributes:
    trainable: the trainable tree after the update.
    sparse: the state of the weight method after the update.
    toggled: bool like the parameters, `None` = dense. True for weights that the update dropped or set to
      zero; their moments and averages are reset to zero.
    non_finite: for each matrix that the update scored, by path, whether a score is NaN or infinite, bool.
  """

  trainable: Tree
  sparse: Sparse
  toggled: Tree
  non_finite: dict[str, Array] = struct.field(default_factory=dict)


def restrict_to(leaves: Tree, like: Tree) -> Tree:
  """Returns the leaves that are not `None` in `like`, and `None` for the others."""
  return tree.where_sparse(lambda leaf, _: leaf, leaves, like, dense=lambda _: None)


def apply_masks(params: Tree, masks: Tree) -> Tree:
  """Sets the parameters outside the masks to zero."""
  return tree.where_sparse(
    lambda w, m: jnp.where(m, w, jnp.zeros_like(w)), params, masks, dense=lambda w: w
  )


def full_masks(params: Tree, target: Tree) -> Tree:
  """Returns masks that keep every weight, for the leaves with a target density; `None` for the others."""
  return tree.where_sparse(
    lambda w, _: jnp.ones(w.shape, bool), params, target, dense=lambda _: None
  )


def exchange_masks(
  trainable: Tree, sparse: Sparse, masks: Tree, survived: Tree | None = None
) -> MaskUpdate:
  """Returns the update that replaces `sparse.masks` by `masks`.

  Weights in both masks keep their values; all other weights become zero. If `survived` (bool) is given,
  only the weights in it keep their values.
  """
  params = trainable['params']
  if survived is None:
    survived = jax.tree.map(jnp.logical_and, sparse.masks, masks)
  toggled = tree.where_sparse(
    lambda w, old, new, kept: (old | new) & ~kept,
    params,
    sparse.masks,
    masks,
    survived,
    dense=lambda w: None,
  )
  masked = trainable | {'params': apply_masks(params, survived)}
  return MaskUpdate(masked, sparse.replace(masks=masks), toggled)


@dataclasses.dataclass(frozen=True)
class WeightMethod:
  """The protocol of weight methods; by default masks never change.

  `trainable` is `{'params': the model's parameters, 'learned': the method's own parameters}`. Methods
  marked "on the host" are called with Python numbers between steps. All others are pure functions inside
  `jit`.

  Attributes:
    total_steps: optimizer steps of the whole run.
    groups: units that span several matrices, as the model declares them.
    traits: the declarations of the method.
  """

  total_steps: int
  groups: tuple[Group, ...] = supplied(())
  traits: ClassVar[Traits] = Traits()

  @property
  def units(self) -> Pattern:
    """The pattern, whose units are kept or dropped together; single weights by default."""
    return Pattern()

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences that a run prints before it starts."""
    return ()

  @property
  def one_shot(self) -> bool:
    """True if the method also prunes trained models (`python -m sparse_lm.prune`)."""
    return False

  @property
  def parts(self) -> dict[str, 'WeightMethod']:
    """The model's weight methods by the name of their rule; a single method has the name ''."""
    return {'': self}

  def with_parts(self, parts: Mapping[str, 'WeightMethod']) -> 'WeightMethod':
    """Returns the same method with other parts."""
    return parts['']

  def owner(self, path: str) -> str | None:
    """Returns the name of the part that decides about the parameter at `path`, or `None`."""
    return ''

  def resting(self, updates: tuple[str, ...], trainable: Tree) -> Tree:
    """Marks the leaves (bool) that get a mask update of these parts instead of an optimizer step."""
    return jax.tree.map(lambda _: bool(updates) and self.traits.replaces_step, trainable)

  @property
  def learned_rates(self) -> dict[str, float]:
    """Learning rates of the method's own parameters, as multiples of the weights' rate.

    Each key is the beginning of a path below `trainable['learned']`. A parameter has the rate of the
    first key that matches its path, or the weights' rate if no key does. The method's own parameters have
    no weight decay.
    """
    return {}

  def check(self) -> None:
    """Raises UserError if fields do not fit each other; called before anything is compiled."""

  def check_one_shot(self) -> None:
    """Raises UserError if fields do not fit the pruning of a trained model."""

  def init(self, key: Array, params: Tree, target: Tree) -> tuple[Tree, Sparse]:
    """Returns the trainable tree and the method's state at step 0."""
    raise NotImplementedError(type(self).__name__)

  def effective(
    self, trainable: Tree, sparse: Sparse, mode: str, step: Array, key: Array | None
  ) -> tuple[Tree, Tree]:
    """Returns the parameters that the model uses, and the density of each prunable leaf.

    Densities are float32 scalars, `None` = dense. Densities of learned masks are differentiable.
    """
    return apply_masks(trainable['params'], sparse.masks), densities(sparse.masks)

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """Returns a float32 scalar that is added to the loss; it is differentiated at `trainable`.

    Args:
      density: the densities that `effective` returned.
    """
    return jnp.float32(0)

  def frozen(self, sparse: Sparse) -> Tree:
    """Marks the weights that an optimizer step does not change: bool like the parameters, `None` = none.

    The step does not change their moments and averages either.
    """
    return jax.tree.map(lambda _: None, sparse.target)

  def rate_factor(self, target: Tree, step: Array) -> Array | None:
    """Returns the factor that multiplies the learning rate at this step, float32; `None` means 1.

    Args:
      target: the final density of each leaf, `None` = dense.
    """
    return None

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Masks the weights after an optimizer step, because moments would change dropped weights.

    A method returns the weights unchanged if dropped weights go on learning and its `update` chooses
    among all weights in every step. Averages are always masked.
    """
    return trainable | {'params': apply_masks(trainable['params'], sparse.masks)}

  @property
  def batches_at_start(self) -> int | None:
    """The number of batches that are read before step 0, for an update of the masks with step 0.

    The signals of this update are means over these batches, at the initial weights. 0 means an update
    without signals, and `None` means no update before step 0.
    """
    return None

  def due(self, step: int) -> bool:
    """Returns whether `update` runs in this step; called on the host, before the step."""
    return False

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Updates the masks.

    Args:
      signals: the signals in `traits.needs` by name: trees like the parameters. A leaf is `None` if it is
        dense. In one-shot pruning, leaves of all layers but the one that is being pruned are `None`.
    """
    raise NotImplementedError(type(self).__name__)

  def update_parts(
    self,
    updates: tuple[str, ...],
    trainable: Tree,
    sparse: Sparse,
    signals: dict[str, dict[str, Tree]],
    step: Array,
    key: Array,
  ) -> MaskUpdate:
    """Calls `update` of each of these parts, with its signals."""
    (name,) = updates
    return self.update(trainable, sparse, signals[name], step, key)

  def non_finite(self, trainable: Tree, sparse: Sparse, step: Array) -> dict[str, Array]:
    """Like `MaskUpdate.non_finite`, for masks that every step chooses anew; empty for stored masks."""
    return {}

  def density(self, target: float, step: int) -> float:
    """Returns the density at `step` of a leaf with the final density `target`. Cost reports use it."""
    return target

  def backward_density(self, target: float, step: int) -> float | None:
    """Returns the fraction of a kernel's weight gradient that a step computes. Cost reports use it.

    `None` means the density of the forward pass. If a signal reads the gradient of a step, that step
    computes the whole gradient.

    Args:
      target: the kernel's final density.
    """
    return 1.0 if self.collects(step) else None

  def collects(self, step: int) -> bool:
    """Returns whether a mask update in this or a later step reads this step's gradient; on the host."""
    found = from_training(self.traits.needs).values()
    window = max((one.batches for one in found), default=0)
    return any(self.due(step + later) for later in range(window))

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """Returns the parameters and masks that are evaluated, packed and fine-tuned."""
    return apply_masks(trainable['params'], sparse.masks), sparse.masks


@dataclasses.dataclass(frozen=True)
class PatternMethod(WeightMethod):
  """A weight method with a config field for its pattern.

  Attributes:
    pattern: which weights are kept or dropped together; see `sparse_lm/patterns/`.
  """

  pattern: str = 'unstructured'

  @property
  def units(self) -> Pattern:
    """The pattern. Raises UserError if the model has no such units."""
    return pattern(self.pattern, self.groups)

  def check_growth(self) -> None:
    """Raises UserError for patterns whose units cannot grow from zero.

    A dropped neuron, head or layer is zero in several matrices that multiply each other. All gradients of
    such a unit are zero, so it would never learn.
    """
    valid = 'a pattern whose units lie in one matrix; units that span several cannot grow from zero'
    require(not self.units.spans_matrices, 'config.weight.pattern', self.pattern, valid)


def densities(masks: Tree) -> Tree:
  """Returns the density of each mask, float32; exact below 2**24 weights."""
  leaves, structure = jax.tree.flatten(masks)
  shares = (count.astype(jnp.float32) / mask.size for mask, count in zip(leaves, counts(leaves)))
  return jax.tree.unflatten(structure, shares)


def mean_density(density: Tree, params: Tree) -> Array:
  """Returns the mean density over all weights of leaves with a density, float32; 1 if there are none."""
  sizes = {path: leaf.size for path, leaf in tree.named(params).items()}
  fractions = tree.named(density)
  total = sum(sizes[path] for path in fractions)
  if not total:
    return jnp.float32(1)
  return sum((sizes[path] / total * fraction for path, fraction in fractions.items()), 0.0)
