"""Single weights, ranked over all matrices."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group
from sparse_lm.core.tree import Tree
from sparse_lm.core.units import Array, Pattern, Shapes, Units, mean_density
from sparse_lm.kernels.topk import topk_masks


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
  """Ranks all matrices together: 'global', 'global:raw', or with a floor 'global:raw:0.01'.

  Attributes:
    raw: whether scores are compared as they are. Otherwise each score is divided by the norm of all
      scores of its matrix, so that matrices of large weights do not keep most of their weights.
    floor: minimum fraction of its weights that each matrix keeps; a floor above 0 keeps at least one
      weight. 0 means that a matrix may lose all of its weights.
  """

  raw: bool = False
  floor: float = 0.0
  spelling: ClassVar[str] = 'global'

  @classmethod
  def parse(cls, name: str, declared: tuple[Group, ...]) -> 'Global | None':
    """Recognises these spellings. Raises UserError for others that begin with 'global'."""
    kind = name.partition(':')[0]
    if kind != cls.spelling:
      return None
    match = re.fullmatch(r'(:raw)?(:(?:0\.\d{1,9}|1e-\d))?', name.removeprefix(kind))
    floor = float(match[2][1:]) if match and match[2] else 0.0
    if match is None or (match[2] and not floor):
      raise UserError(
        f'config.weight.pattern {name!r} is not valid; valid: {kind}, {kind}:raw, or either with a floor '
        f'between 0 and 1, such as {kind}:raw:0.01'
      )
    return cls(bool(match[1]), floor)

  @property
  def spans_layers(self) -> bool:
    """True: the weights of all layers are ranked together."""
    return True

  @property
  def unconstrained(self) -> bool:
    """True: any set of a matrix's weights may be kept."""
    return True

  def pool(self, leaves: Tree) -> Units:
    """Concatenates all scores into one array."""
    scaled = [
      leaf.ravel() / (1.0 if self.raw else jnp.maximum(jnp.linalg.norm(leaf.ravel()), 1e-30))
      for leaf in tree.named(leaves).values()
    ]
    return {'all': jnp.concatenate(scaled)}

  def expand(self, units: Units, like: Tree) -> Tree:
    """Splits the array into the parts of the leaves."""
    parts, start = {}, 0
    for path, leaf in tree.named(like).items():
      parts[path] = units['all'][start : start + leaf.size].reshape(leaf.shape)
      start += leaf.size
    return tree.map_named(lambda path, leaf: parts[path], like)

  def densities(self, target: Tree, like: Tree) -> dict[str, Array]:
    """Returns the mean density over all weights."""
    return {'all': mean_density(tree.named(target), tree.named(like))}

  def select(self, units: Units, densities: Mapping[str, Array], like: Tree) -> Units:
    """Selects the weights that the floors keep, then the largest scores of all matrices."""
    if self.floor:
      first = list(tree.named(self.expand(units, like)).values())
      least = [_at_least(math.prod(leaf.shape[-2:]), self.floor) for leaf in first]
      best = [mask.ravel() for mask in topk_masks(first, least)]
      # Weights that were dropped earlier have a score of minus infinity, and the floor does not regrow
      # them.
      chosen = jnp.concatenate(best) & ~jnp.isneginf(units['all'])
      units = {'all': jnp.where(chosen, jnp.inf, units['all'])}
    return super().select(units, densities, like)

  def round_to_units(self, shapes: Shapes, density: Mapping[str, float]) -> dict[str, float]:
    """Rounds to whole weights. Raises UserError if the floors need more weights than are kept."""
    found = super().round_to_units(shapes, density)
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    left = round(sum(found[path] * size for path, size in sizes.items()))
    least = sum(
      math.prod(shape[:-2]) * _at_least(math.prod(shape[-2:]), self.floor)
      for shape in shapes.values()
    )
    if self.floor and least > left:
      raise UserError(
        f'config.weight.pattern: the floor of {self.floor} needs {least:,} weights, and '
        f'config.weight.sparsity leaves {left:,}; valid: a floor up to about '
        f'{left / sum(sizes.values()):.4g}, or a lower sparsity'
      )
    return found


def _at_least(size: int, floor: float) -> int:
  """Returns the minimum number of weights that a matrix of this size keeps."""
  return max(1, round(size * floor))
