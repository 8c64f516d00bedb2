"""Units: what is kept or dropped as a whole, and what every pattern of them shares.

A pattern pools the scores of weights into scores of its *units*, keeps the best units, and spreads the
decision over the weights again. Units come as arrays by name: one for each matrix, or one for each
group of matrices that share them. Counts are exact, ties go to the lower flat index, and the density
may be traced, so that one executable serves a sweep of sparsities.

Kernels have two trailing axes `[in, out]`; leading axes (experts) are batch, each slice with a count of
its own. The patterns themselves are one file each in `sparse_lm/patterns/`.
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

TOLERANCE = 0.01  # how far from the density that was asked for rounding to whole units may lead


def kept(size: int, density: Array | float) -> Array:
  """`max(1, round(size * density))` as int32; exact where `size` is below 2**23."""
  return jnp.maximum(1, jnp.round(size * jnp.asarray(density, jnp.float32))).astype(jnp.int32)


def by_slice(f: Callable, array: Array, *rest: Array) -> Array:
  """Applies `f` to every trailing matrix of `array` (a vector counts as one matrix)."""
  for _ in range(max(array.ndim - 2, 0)):
    f = jax.vmap(f)
  return f(array, *rest)


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which sets of weights may be kept: the base class, whose units are single weights of one matrix.

  Trees have `None` where a leaf is dense; units come as arrays by name.

  Attributes:
    spelling: how a config names the pattern: the name of its file, or an example such as '2:4'.
  """

  spelling: ClassVar[str] = ''

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Pattern | None':
    """The pattern of that name, or `None` where the name is another pattern's.

    Args:
      name: as `config.weight.pattern` spells it.
      declared: the units that span matrices, as the model declares them.

    Raises UserError where the name is this pattern's and what follows is not valid.
    """
    return cls() if name == cls.spelling else None

  @property
  def lookahead(self) -> int | None:
    """How many consecutive inputs decide together which of their weights are kept.

    1 where weights are ranked one by one, M of N:M, and `None` where the units are not parts of single
    outputs' inputs, so that no decision can be made input by input (as SparseGPT makes them).
    """
    return None

  @property
  def spans_layers(self) -> bool:
    """Whether units of different layers compete, or are one."""
    return False

  @property
  def spans_matrices(self) -> bool:
    """Whether a unit may have weights in several matrices."""
    return False

  @property
  def unconstrained(self) -> bool:
    """Whether any set of a matrix's weights may be kept."""
    return False

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter has units of this pattern; what has none stays dense."""
    return True

  def top(self, units: Array, count: Array) -> Array:
    """bool, the `count` largest of one unstacked array of units."""
    return topk_mask(units, count)

  def top_of(self, name: str) -> Callable[[Array, Array], Array] | None:
    """The function that selects units of the array `name`; `None` where any set of them may be kept."""
    return None if type(self).top is Pattern.top else self.top

  def largest(self, units: Units, counts: Mapping[str, Array]) -> Units:
    """Masks of the largest units of every trailing matrix, bool like `units`.

    Args:
      units: scores.
      counts: by name, how many units to select, int32 that broadcasts to the leading axes.
    """
    tops = {name: self.top_of(name) for name in units}
    free = [name for name in units if tops[name] is None]
    masks = topk_masks([units[name] for name in free], [counts[name] for name in free])
    found = dict(zip(free, masks))
    for name in units.keys() - found:
      each = jnp.broadcast_to(counts[name], units[name].shape[:-2])
      found[name] = by_slice(tops[name], units[name], each)
    return {name: found[name] for name in units}

  def threshold(self, units: Array, keeps: Array) -> Array:
    """The largest score of a dropped unit among those that a unit of one unstacked array competes with.

    Args:
      units: scores.
      keeps: bool, what `top` keeps of them.

    Returns:
      What broadcasts to `units`; 0 where no unit is dropped.
    """
    return largest_dropped(units, keeps)

  def pool_leaf(self, path: str, leaf: Array) -> Array:
    """Mean over each unit of one leaf, `[..., in units, out units]`."""
    return leaf

  def expand_leaf(self, units: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `pool_leaf`: a unit's value at each of its weights."""
    return units

  def pool(self, leaves: Tree) -> Units:
    """Mean of the leaves' values over each unit."""
    return {path: self.pool_leaf(path, leaf) for path, leaf in tree.named(leaves).items()}

  def expand(self, units: Units, like: Tree) -> Tree:
    """Each unit's value at every weight of it: arrays shaped like the leaves of `like`."""
    return tree.map_named(lambda path, leaf: self.expand_leaf(units[path], leaf.shape), like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """The density of each array of units where its leaves have those of `target`."""
    return tree.named(target)

  def select(self, units: Units, densities: Mapping[str, Array], like: Tree) -> Units:
    """The units that are kept, bool.

    Args:
      units: scores.
      densities: of each array of units.
      like: leaves of the shapes that the units were pooled from.
    """
    counts = {
      name: kept(math.prod(array.shape[-2:]), densities[name]) for name, array in units.items()
    }
    return self.largest(units, counts)

  def masks(self, scores: Tree, target: Tree) -> Tree:
    """The weights that are kept: bool, shaped like the leaves of `scores`."""
    chosen = self.select(self.pool(scores), self.densities(target, scores), scores)
    return self.expand(chosen, scores)

  def alive(self, masks: Tree) -> Units:
    """The units that `masks` keep, bool."""
    pooled = self.pool(jax.tree.map(lambda mask: mask.astype(jnp.float32), masks))
    return {name: array > 0 for name, array in pooled.items()}

  def check(self, shapes: Shapes) -> None:
    """Raises UserError where the units don't fit the shapes."""

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """The densities that whole units come to, for those asked for.

    Raises UserError where a few large units are too coarse for what was asked for.
    """
    return {path: rounded(math.prod(shapes[path][-2:]), d) for path, d in density.items()}


def largest_dropped(units: Array, keeps: Array, axis: int | None = None) -> Array:
  """The largest of `units` where `keeps` is False, over all or along an axis; 0 where all are kept."""
  largest = jnp.max(jnp.where(keeps, -jnp.inf, units), axis=axis, keepdims=True)
  return jnp.where(jnp.isneginf(largest), 0.0, largest)


def rounded(units: int, density: float) -> float:
  """The density that whole units come to, one at least."""
  return max(1, round(units * density)) / units


def rounded_to_units(units: int, density: float, what: str) -> float:
  """`rounded`, but raises UserError where that is far from what was asked for."""
  got = rounded(units, density)
  if abs(got - density) > TOLERANCE:
    near = sorted({1 - rounded(units, n / units) for n in _around(units * density)})
    raise UserError(
      f'config.weight.pattern: the {units} units of {what} cannot express a sparsity of '
      f'{1 - density:.4g}; valid: {" or ".join(f"{s:.4g}" for s in near)}'
    )
  return got


def _around(count: float) -> tuple[int, int]:
  return math.floor(count), math.ceil(count)


def is_matrix(shape: tuple[int, ...]) -> bool:
  """Whether a parameter is a kernel `[in, out]`, or a stack of them."""
  return len(shape) >= 2


def mean_density(density: Mapping[str, Array], leaves: Mapping[str, Array]) -> Array:
  """The mean of densities over all weights of the leaves that have one."""
  sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
  return sum(density[path] * sizes[path] for path in sizes) / sum(sizes.values())
