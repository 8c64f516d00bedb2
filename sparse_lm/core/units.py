"""The base class of patterns. A pattern defines the units that are kept or dropped as a whole.

A pattern pools the scores of weights into scores of units, selects the units with the largest scores, and
expands the selection to a mask of weights. Units are stored as arrays by name: one array per matrix, or
one per group of matrices. The number of kept units is exact, and ties go to the lower flat index. The
density may be traced, so one executable serves a sweep of sparsities.

Kernels have two trailing axes `[in, out]`. Leading axes (experts) are batch axes: each matrix of the
batch keeps its own number of units. Each pattern is one file in `sparse_lm/patterns/`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group
from sparse_lm.core.tree import Tree
from sparse_lm.kernels.topk import topk_mask, topk_masks

Array = jax.Array
Units = dict[str, Array]
Shapes = Mapping[str, tuple[int, ...]]

TOLERANCE = 0.01  # largest change of a density by rounding to whole units


def kept_count(size: int, density: Array | float) -> Array:
  """Returns `max(1, round(size * density))` as int32; exact for `size` below 2**23."""
  return jnp.maximum(1, jnp.round(size * jnp.asarray(density, jnp.float32))).astype(jnp.int32)


def per_matrix(f: Callable, array: Array, *rest: Array) -> Array:
  """Applies `f` to each matrix (the last two axes) of `array`; a vector counts as one matrix."""
  for _ in range(max(array.ndim - 2, 0)):
    f = jax.vmap(f)
  return f(array, *rest)


@dataclasses.dataclass(frozen=True)
class Pattern:
  """The base class of patterns. Its units are the single weights of each matrix.

  In trees, `None` means that a parameter is dense. Units are arrays by name.

  Attributes:
    spelling: the pattern's name in a config: the name of its file, or an example such as '2:4'.
  """

  spelling: ClassVar[str] = ''

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Pattern | None':
    """Returns the pattern that `name` stands for, or `None` if it is the name of another pattern.

    Args:
      name: value of `config.weight.pattern`.
      declared: groups of units that span matrices, as the model declares them.

    Raises:
      UserError: the name belongs to this pattern, but its argument is not valid.
    """
    return cls() if name == cls.spelling else None

  @property
  def inputs_per_group(self) -> int | None:
    """Number of consecutive inputs among whose weights the pattern selects, for each output.

    1 if weights are ranked one by one, and M for N:M. `None` for all other patterns: their masks cannot
    be chosen group by group, as SparseGPT does.
    """
    return None

  @property
  def spans_layers(self) -> bool:
    """Whether units of different layers are ranked together, or a unit spans layers."""
    return False

  @property
  def spans_matrices(self) -> bool:
    """Whether a unit may have weights in several matrices."""
    return False

  @property
  def unconstrained(self) -> bool:
    """Whether any subset of a matrix's weights may be kept."""
    return False

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether the parameter has units of this pattern; other parameters stay dense."""
    return True

  def top(self, units: Array, count: Array) -> Array:
    """Returns a bool mask of the `count` largest entries of one array of units without leading axes."""
    return topk_mask(units, count)

  def top_of(self, name: str) -> Callable[[Array, Array], Array] | None:
    """Returns the function that selects units of the array `name`; `None` means plain top-k."""
    return None if type(self).top is Pattern.top else self.top

  def largest(self, units: Units, counts: Mapping[str, Array]) -> Units:
    """Selects the units with the largest scores in each matrix.

    Args:
      units: scores of the units by name.
      counts: number of units to select by name, int32 that broadcasts to the leading axes.

    Returns:
      Bool masks with the shapes of `units`.
    """
    tops = {name: self.top_of(name) for name in units}
    free = [name for name in units if tops[name] is None]
    masks = topk_masks([units[name] for name in free], [counts[name] for name in free])
    found = dict(zip(free, masks))
    for name in units.keys() - found:
      each = jnp.broadcast_to(counts[name], units[name].shape[:-2])
      found[name] = per_matrix(tops[name], units[name], each)
    return {name: found[name] for name in units}

  def threshold(self, units: Array, keeps: Array) -> Array:
    """Returns, for each unit, the largest dropped score among the units that it is ranked with.

    Args:
      units: scores of one array of units without leading axes.
      keeps: bool, the selection of `top`.

    Returns:
      An array that broadcasts to `units`; 0 where no unit is dropped.
    """
    return largest_dropped(units, keeps)

  def pool_leaf(self, path: str, leaf: Array) -> Array:
    """Returns the mean of one leaf over each unit, `[..., in units, out units]`."""
    return leaf

  def expand_leaf(self, units: Array, shape: tuple[int, ...]) -> Array:
    """Copies each unit's value to all of its weights; the inverse of `pool_leaf`."""
    return units

  def pool(self, leaves: Tree) -> Units:
    """Returns the mean of the leaves' values over each unit."""
    return {path: self.pool_leaf(path, leaf) for path, leaf in tree.named(leaves).items()}

  def expand(self, units: Units, like: Tree) -> Tree:
    """Copies each unit's value to all of its weights; returns a tree of the shapes of `like`."""
    return tree.map_named(lambda path, leaf: self.expand_leaf(units[path], leaf.shape), like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """Returns the density of each array of units, from the densities `target` of the parameters."""
    return tree.named(target)

  def select(self, units: Units, densities: Mapping[str, Array], like: Tree) -> Units:
    """Selects the units to keep; returns bool arrays.

    Args:
      units: scores of the units by name.
      densities: density of each array of units.
      like: a tree with the shapes of the parameters that the units were pooled from.
    """
    counts = {
      name: kept_count(math.prod(array.shape[-2:]), densities[name])
      for name, array in units.items()
    }
    return self.largest(units, counts)

  def masks(self, scores: Tree, target: Tree) -> Tree:
    """Returns the masks of the weights to keep: bool, with the shapes of `scores`."""
    chosen = self.select(self.pool(scores), self.densities(target, scores), scores)
    return self.expand(chosen, scores)

  def alive(self, masks: Tree) -> Units:
    """Returns which units have at least one weight that `masks` keep, bool."""
    pooled = self.pool(jax.tree.map(lambda mask: mask.astype(jnp.float32), masks))
    return {name: array > 0 for name, array in pooled.items()}

  def check(self, shapes: Shapes) -> None:
    """Raises a UserError if the units do not fit the shapes."""

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds densities to whole units.

    Raises:
      UserError: the units are so few that rounding changes a density by more than `TOLERANCE`.
    """
    return {path: rounded(math.prod(shapes[path][-2:]), d) for path, d in density.items()}


def largest_dropped(units: Array, keeps: Array, axis: int | None = None) -> Array:
  """Returns the largest dropped unit, overall or along an axis; 0 if all units are kept."""
  largest = jnp.max(jnp.where(keeps, -jnp.inf, units), axis=axis, keepdims=True)
  return jnp.where(jnp.isneginf(largest), 0.0, largest)


def rounded(units: int, density: float) -> float:
  """Rounds a density to whole units, of which at least one is kept."""
  return max(1, round(units * density)) / units


def rounded_to_units(units: int, density: float, what: str) -> float:
  """Like `rounded`, but raises a UserError if that changes the density by more than `TOLERANCE`."""
  got = rounded(units, density)
  if abs(got - density) > TOLERANCE:
    near = sorted({1 - rounded(units, n / units) for n in _around(units * density)})
    raise UserError(
      f'config.weight.pattern: the {units} units of {what} cannot have a sparsity of '
      f'{1 - density:.4g}; valid: {" or ".join(f"{s:.4g}" for s in near)}'
    )
  return got


def _around(count: float) -> tuple[int, int]:
  return math.floor(count), math.ceil(count)


def is_matrix(shape: tuple[int, ...]) -> bool:
  """Returns whether a parameter is a kernel `[in, out]` or a stack of kernels."""
  return len(shape) >= 2


def mean_density(density: Mapping[str, Array], leaves: Mapping[str, Array]) -> Array:
  """Returns the mean of the leaves' densities, weighted by their sizes."""
  sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
  return sum(density[path] * sizes[path] for path in sizes) / sum(sizes.values())
