"""Patterns: which sets of weights may be kept.

A pattern pools scores of weights into scores of its *units*, keeps the best units, and spreads what was
decided over the weights again. Units come as arrays by name: one for each matrix, or one for each group
of matrices that share them. Counts are exact, ties go to the lower flat index, and the density may be
traced, so that one executable serves a sweep of sparsities.

unstructured  the weights of a matrix
N:M           N of each M consecutive inputs of an output (the reduction axis, as hardware groups them)
block:B       B x B tiles
per_output    an equal share of the inputs of every output
row, column   all of an input's weights, all of an output's weights
global        the weights of all matrices together, scores over their matrix's norm
neuron, head, layer   units that span matrices, as the model declares them (`core/groups.py`)

Kernels have 2-D trailing `[in, out]`; leading axes (experts) are batch, each slice with its own count.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sparse_lm.core import groups, tree
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.groups import Group
from sparse_lm.core.select import topk_mask, topk_rows
from sparse_lm.core.tree import Tree

Array = jax.Array
Units = dict[str, Array]
Shapes = Mapping[str, tuple[int, ...]]

KINDS = ('neuron', 'head', 'layer')
NAMES = ('unstructured', 'per_output', '2:4', 'block:16', 'row', 'column', 'global', *KINDS)


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
  """The weights of a matrix, and the base of the other patterns.

  Trees have `None` where a leaf is dense; units come by name.
  """

  @property
  def spans_layers(self) -> bool:
    """Whether units of different layers compete, or are one."""
    return False

  @property
  def spans_matrices(self) -> bool:
    """Whether a unit may have weights in several matrices."""
    return False

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Whether the parameter has units of this pattern; what has none stays dense."""
    return True

  def top(self, units: Array, count: Array) -> Array:
    """bool, the `count` largest of one unstacked array of units."""
    return topk_mask(units, count)

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

  def select(self, units: Units, densities: Mapping[str, Array]) -> Units:
    """The units that are kept, bool."""
    return {
      name: by_slice(lambda u, d=densities[name]: self.top(u, kept(u.size, d)), array)
      for name, array in units.items()
    }

  def masks(self, scores: Tree, target: Tree) -> Tree:
    """The weights that are kept: bool, shaped like the leaves of `scores`."""
    chosen = self.select(self.pool(scores), self.densities(target, scores))
    return self.expand(chosen, scores)

  def alive(self, masks: Tree) -> Units:
    """The units that `masks` keep, bool."""
    pooled = self.pool(jax.tree.map(lambda mask: mask.astype(jnp.float32), masks))
    return {name: array > 0 for name, array in pooled.items()}

  def check(self, shapes: Shapes) -> None:
    """Raises UserError where the units don't fit the shapes."""

  def express(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """The densities that whole units come to, for those asked for.

    Raises UserError where a few large units are too coarse for what was asked for.
    """
    return {path: _rounded(math.prod(shapes[path][-2:]), d) for path, d in density.items()}


TOLERANCE = 0.01  # how far from the density that was asked for rounding to whole units may lead


def _rounded(units: int, density: float) -> float:
  return max(1, round(units * density)) / units


def _expressed(units: int, density: float, what: str) -> float:
  """`_rounded`, but raises UserError where that is far from what was asked for."""
  got = _rounded(units, density)
  if abs(got - density) > TOLERANCE:
    near = sorted({1 - _rounded(units, n / units) for n in _around(units * density)})
    raise UserError(
      f'config.weight.pattern: the {units} units of {what} cannot express a sparsity of '
      f'{1 - density:.4g}; valid: {" or ".join(f"{s:.4g}" for s in near)}'
    )
  return got


def _around(count: float) -> tuple[int, int]:
  return math.floor(count), math.ceil(count)


def _is_matrix(shape: tuple[int, ...]) -> bool:
  return len(shape) >= 2


@dataclasses.dataclass(frozen=True)
class NOfM(Pattern):
  """`n` of each `m` consecutive inputs; while a ramp is denser than that, more of them."""

  n: int
  m: int

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Matrices."""
    return _is_matrix(shape)

  def top(self, units: Array, count: Array) -> Array:
    """The same number of each group, by rank within it."""
    each = jnp.clip(jnp.round(count * (self.m / units.size)), 1, self.m)
    group = units.reshape(-1, self.m, units.shape[-1])
    # An entry's rank: how many of its group are larger, or equal and earlier.
    mine, other = group[:, :, None], group[:, None, :]
    index = jnp.arange(self.m)
    earlier = (index[None, :] < index[:, None])[None, :, :, None]
    rank = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2)
    return (rank < each).reshape(units.shape)

  def check(self, shapes: Shapes) -> None:
    """Raises UserError unless `m` divides every input axis."""
    for path, shape in shapes.items():
      if shape[-2] % self.m:
        raise UserError(
          f"config.weight.pattern '{self.n}:{self.m}': {self.m} doesn't divide the {shape[-2]} inputs "
          f'of {path}; valid: a divisor'
        )

  def express(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """n/m, or 1 of what stays dense. Raises UserError for any other density."""
    for path, asked in density.items():
      if asked < 1 and abs(asked - self.n / self.m) > 1e-6:
        raise UserError(
          f"config.weight.pattern '{self.n}:{self.m}' cannot express a sparsity of {1 - asked:.4g} "
          f'(of {path}); valid: config.weight.sparsity={1 - self.n / self.m:.6g} with '
          "config.weight.budget='uniform'"
        )
    return dict(density)


@dataclasses.dataclass(frozen=True)
class PerOutput(Pattern):
  """As many inputs of every output: a constant fan-in."""

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Matrices."""
    return _is_matrix(shape)

  def top(self, units: Array, count: Array) -> Array:
    """The same number of each column."""
    return topk_rows(units.T, kept(units.shape[0], count / units.size)).T

  def express(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Whole counts of each output's inputs."""
    return {path: _expressed(shapes[path][-2], d, path) for path, d in density.items()}


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
  """Tiles of `size` x `size` weights (a tile of 0 is the whole axis)."""

  rows: int
  columns: int

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Matrices."""
    return _is_matrix(shape)

  def _tile(self, shape: tuple[int, ...]) -> tuple[int, int]:
    return self.rows or shape[-2], self.columns or shape[-1]

  def pool_leaf(self, path: str, leaf: Array) -> Array:
    """Mean over each tile."""
    rows, columns = self._tile(leaf.shape)
    *lead, i, o = leaf.shape
    tiles = leaf.reshape(*lead, i // rows, rows, o // columns, columns)
    return jnp.mean(tiles, axis=(-3, -1), dtype=jnp.float32)

  def expand_leaf(self, units: Array, shape: tuple[int, ...]) -> Array:
    """Each tile's value, tile by tile."""
    rows, columns = self._tile(shape)
    return jnp.repeat(jnp.repeat(units, rows, axis=-2), columns, axis=-1)

  def check(self, shapes: Shapes) -> None:
    """Raises UserError where a tile doesn't divide a matrix."""
    for path, shape in shapes.items():
      rows, columns = self._tile(shape)
      if shape[-2] % rows or shape[-1] % columns:
        common = math.gcd(shape[-2], shape[-1])
        raise UserError(
          f"config.weight.pattern 'block:{rows}' doesn't divide {path} of {shape[-2]} x {shape[-1]}; "
          f'valid: a divisor of {common}, or another pattern'
        )

  def express(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Whole tiles."""
    found = {}
    for path, asked in density.items():
      rows, columns = self._tile(shapes[path])
      tiles = shapes[path][-2] // rows * (shapes[path][-1] // columns)
      found[path] = _expressed(tiles, asked, path)
    return found


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
  """One ranking over all matrices.

  Scores count over the norm of their matrix's, or matrices of large weights would keep everything.
  """

  @property
  def spans_layers(self) -> bool:
    """Always."""
    return True

  def pool(self, leaves: Tree) -> Units:
    """All scores in one array."""
    scaled = [
      leaf.ravel() / jnp.maximum(jnp.linalg.norm(leaf.ravel()), 1e-30)
      for leaf in tree.named(leaves).values()
    ]
    return {'all': jnp.concatenate(scaled)}

  def expand(self, units: Units, like: Tree) -> Tree:
    """The part of the array that is each leaf's."""
    parts, start = {}, 0
    for path, leaf in tree.named(like).items():
      parts[path] = units['all'][start : start + leaf.size].reshape(leaf.shape)
      start += leaf.size
    return tree.map_named(lambda path, leaf: parts[path], like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """The mean over all weights."""
    return {'all': _mean_density(tree.named(target), tree.named(like))}


@dataclasses.dataclass(frozen=True)
class Grouped(Pattern):
  """Units that span matrices. Leaves of no group stay dense."""

  groups: tuple[Group, ...]

  @property
  def spans_layers(self) -> bool:
    """Where the units are the layers."""
    return any(group.kind == 'layer' for group in self.groups)

  @property
  def spans_matrices(self) -> bool:
    """Always."""
    return True

  def covers(self, path: str, shape: tuple[int, ...]) -> bool:
    """Members of a group."""
    return any(member.path == path for group in self.groups for member in group.members)

  def _present(self, leaves: Mapping[str, Array]) -> dict[str, Group]:
    return {
      group.name: group for group in self.groups if any(m.path in leaves for m in group.members)
    }

  def pool(self, leaves: Tree) -> Units:
    """Mean over all weights of each unit."""
    named = tree.named(leaves)
    return {name: groups.pool(group, named) for name, group in self._present(named).items()}

  def expand(self, units: Units, like: Tree) -> Tree:
    """Each unit's value at every weight of it."""
    shapes = {path: leaf.shape for path, leaf in tree.named(like).items()}
    parts: dict[str, Array] = {}
    for name, group in self._present(shapes).items():
      parts |= groups.expand(group, units[name], shapes)
    return tree.map_named(lambda path, leaf: parts[path], like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """The mean over the weights of each group."""
    density, leaves = tree.named(target), tree.named(like)
    found = {}
    for name, group in self._present(leaves).items():
      members = {m.path: leaves[m.path] for m in group.members if m.path in leaves}
      found[name] = _mean_density({path: density[path] for path in members}, members)
    return found

  def express(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Whole units of each group, the same share of all its members."""
    like = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    asked, found = self.densities(density, like), {}
    for name, group in self._present(shapes).items():
      share = _expressed(group.units, float(asked[name]), name)
      found |= {m.path: share for m in group.members if m.path in shapes}
    return found


def _mean_density(density: Mapping[str, Array], leaves: Mapping[str, Array]) -> Array:
  sizes = {path: math.prod(leaf.shape) for path, leaf in leaves.items()}
  return sum(density[path] * sizes[path] for path in sizes) / sum(sizes.values())


def pattern(name: str, declared: tuple[Group, ...] = ()) -> Pattern:
  """The pattern of that name; `declared` are the model's groups.

  Raises UserError for an unknown name, N above M, a block of no weights, or a kind of group that the
  model declares none of.
  """
  if name == 'unstructured':
    return Pattern()
  if name == 'global':
    return Global()
  if name == 'per_output':
    return PerOutput()
  if name in ('row', 'column'):
    return Block(*((1, 0) if name == 'row' else (0, 1)))
  if match := re.fullmatch(r'(\d{1,9}):(\d{1,9})', name):
    n, m = map(int, match.groups())
    if not 1 <= n <= m:
      raise UserError(f'config.weight.pattern {name!r}: valid: N:M with 1 <= N <= M')
    return NOfM(n, m)
  if match := re.fullmatch(r'block:([1-9]\d{0,8})', name):
    return Block(int(match[1]), int(match[1]))
  if name in KINDS:
    chosen = tuple(group for group in declared if group.kind == name)
    if not chosen:
      raise UserError(f'config.weight.pattern {name!r}: the model declares no {name} to prune')
    return Grouped(chosen)
  raise unknown('config.weight.pattern', name, NAMES)
