"""What every weight method shares: the state and the protocol.

A weight method decides which connections exist. It is a frozen dataclass in a file of its own under
`methods/weight/`; a field with a default is a config key, `total_steps` and the model's `groups` are
what the trainer supplies. A method that scores weights and keeps the best derives from
`weights/score.py` and writes nothing but the score.
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
  """Which connections exist.

  Attributes:
    masks: like the parameters, bool, `None` = dense. Methods that keep dropped weights alive store no
      masks.
    target: like the parameters, the final density as float32 scalars, `None` = never pruned.
    extra: whatever else a method keeps from step to step.
  """

  masks: Tree
  target: Tree
  extra: Tree = None


class MaskUpdate(struct.PyTreeNode):
  """What an update of the connections did.

  Attributes:
    trainable: the trainable tree after it.
    sparse: the sparse state after it.
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


def full_masks(params: Tree, target: Tree) -> Tree:
  """Masks that keep every weight of the leaves with a target, `None` elsewhere."""
  return tree.where_sparse(
    lambda w, _: jnp.ones(w.shape, bool), params, target, dense=lambda _: None
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
  """The protocol, with the behaviour of a fixed mask.

  `trainable` is `{'params': model parameters, 'learned': the method's own}`. What says "on the host" is
  called with Python numbers between steps; everything else is a pure function that runs inside jit.

  Attributes:
    total_steps: optimizer steps of the whole run.
    groups: units that span matrices, as the model declares them.
    traits: what the method declares about itself.
  """

  total_steps: int
  groups: tuple[Group, ...] = supplied(())
  traits: ClassVar[Traits] = Traits()

  @property
  def units(self) -> Pattern:
    """What is kept or dropped as a whole: single weights, unless a config field says otherwise."""
    return Pattern()

  @property
  def notes(self) -> tuple[str, ...]:
    """Sentences that a run says before it starts."""
    return ()

  @property
  def one_shot(self) -> bool:
    """Whether the method prunes trained models too (`python -m sparse_lm.prune`)."""
    return False

  @property
  def parts(self) -> dict[str, 'WeightMethod']:
    """The methods that decide about the model's weights, by the name of their rule; '' if only one."""
    return {'': self}

  def with_parts(self, parts: Mapping[str, 'WeightMethod']) -> 'WeightMethod':
    """The same method with `parts` in place of its own."""
    return parts['']

  def owner(self, path: str) -> str | None:
    """The part that decides about the parameter at `path`; `None` where no part does."""
    return ''

  def resting(self, updates: tuple[str, ...], trainable: Tree) -> Tree:
    """Which leaves (bool) the optimizer leaves alone in a step that updates the masks of these parts."""
    return jax.tree.map(lambda _: bool(updates) and self.traits.replaces_step, trainable)

  @property
  def learned_rates(self) -> dict[str, float]:
    """Learning rates of what the method learns besides the weights, over that of the weights.

    They go by the beginning of a path below `trainable['learned']`: the first that fits holds, and
    where none does the rate is that of the weights. What is learned is never decayed.
    """
    return {}

  def check(self) -> None:
    """Raises UserError where fields do not fit each other, before anything is compiled."""

  def check_one_shot(self) -> None:
    """Raises UserError where fields do not fit the pruning of a trained model."""

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

  def penalty(self, trainable: Tree, sparse: Sparse, density: Tree) -> Array:
    """What is added to the loss, a float32 scalar; differentiated at `trainable`.

    Args:
      density: of `effective`, the fraction of each leaf that runs.
    """
    return jnp.float32(0)

  def frozen(self, sparse: Sparse) -> Tree:
    """The weights that training leaves as they are: bool like the parameters, `None` = none of a leaf.

    An optimizer step changes neither these weights nor their moments and averages.
    """
    return jax.tree.map(lambda _: None, sparse.target)

  def rate_factor(self, target: Tree, step: Array) -> Array | None:
    """What the learning rate of a step is multiplied with, float32; `None` = 1.

    Args:
      target: the final density of each leaf, `None` = dense.
    """
    return None

  def constrain(self, trainable: Tree, sparse: Sparse) -> Tree:
    """Masks the weights again after an optimizer update: moments and decay would wake dead ones.

    A method whose dropped weights go on learning, and whose `update` chooses among all weights in every
    step, leaves them as they are here. Averages are masked in any case.
    """
    return trainable | {'params': apply_masks(trainable['params'], sparse.masks)}

  @property
  def batches_at_start(self) -> int | None:
    """Batches of training text before step 0, after which `update` runs once, with step 0.

    Its signals are means over these batches at the weights of step 0, which they leave as they are. 0
    means that it runs without signals, and `None` that no update runs before step 0.
    """
    return None

  def due(self, step: int) -> bool:
    """Whether `update` runs in this step (on the host)."""
    return False

  def update(
    self, trainable: Tree, sparse: Sparse, signals: dict[str, Tree], step: Array, key: Array
  ) -> MaskUpdate:
    """Changes the connections.

    Args:
      signals: those of `traits.needs`, by name: trees like the parameters, `None` where a leaf is dense
        or, in one-shot pruning, belongs to another layer than the one that is being pruned.
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
    """The `update` of each of these parts, with the signals that it needs, by part."""
    (name,) = updates
    return self.update(trainable, sparse, signals[name], step, key)

  def density(self, target: float, step: int) -> float:
    """Density that a leaf with this final density has at `step`, for the cost ledger (on the host)."""
    return target

  def backward_density(self, target: float, step: int) -> float | None:
    """The fraction of a kernel that the weight gradient is computed for, for the ledger (on the host).

    `None` means as much as the forward pass computes with. A step that collects a signal needs all of
    the gradient.

    Args:
      target: the kernel's final density.
    """
    return 1.0 if self.collects(step) else None

  def collects(self, step: int) -> bool:
    """Whether an update in this step, or in one after it, reads the step's gradient (on the host)."""
    found = from_training(self.traits.needs).values()
    window = max((one.batches for one in found), default=0)
    return any(self.due(step + later) for later in range(window))

  def finalize(self, trainable: Tree, sparse: Sparse, step: Array) -> tuple[Tree, Tree]:
    """The parameters and masks that are packed, reported and fine-tuned."""
    return apply_masks(trainable['params'], sparse.masks), sparse.masks


@dataclasses.dataclass(frozen=True)
class PatternMethod(WeightMethod):
  """A weight method whose units a config field names.

  Attributes:
    pattern: which sets of weights may be kept, see `sparse_lm/patterns/`.
  """

  pattern: str = 'unstructured'

  @property
  def units(self) -> Pattern:
    """The units of `pattern`. Raises UserError where the model has none such."""
    return pattern(self.pattern, self.groups)

  def check_growth(self) -> None:
    """Raises UserError for units that could not grow from zero.

    A unit of several matrices that multiply each other (a neuron, a head, a layer) would be zero in all
    of them, where every gradient is zero too: it would never learn.
    """
    valid = 'a pattern whose units are each of one matrix: what spans several cannot grow from zero'
    require(not self.units.spans_matrices, 'config.weight.pattern', self.pattern, valid)


def densities(masks: Tree) -> Tree:
  """The fraction that each mask keeps, float32; exact below 2**24 weights."""
  leaves, structure = jax.tree.flatten(masks)
  shares = (count.astype(jnp.float32) / mask.size for mask, count in zip(leaves, counts(leaves)))
  return jax.tree.unflatten(structure, shares)


def mean_density(density: Tree, params: Tree) -> Array:
  """The fraction over all leaves that have one, float32; 1 where none has."""
  sizes = {path: leaf.size for path, leaf in tree.named(params).items()}
  fractions = tree.named(density)
  total = sum(sizes[path] for path in fractions)
  if not total:
    return jnp.float32(1)
  return sum((sizes[path] / total * fraction for path, fraction in fractions.items()), 0.0)
