"""Distributes one target sparsity over the parameters. Runs on the host, in float64.

- `uniform`: every parameter gets the target sparsity.
- `er`, `erk`: Erdős–Rényi (SET, Mocanu et al. 2018; ERK is RigL's version for kernels, Evci et al. 2020).
  The density is proportional to `(in + out) / (in * out)`, so small and narrow matrices stay denser. Both
  are equal for matrices, and a transformer has no other kernels.
- a map, for example `'attention=0.5,mlp=0.9'`: each entry gives a sparsity to the parameters whose path
  matches its regular expression. The first match wins. Other parameters get the target sparsity.
- `owl`: layers with more outliers stay denser (OWL, Yin et al. 2023). `owl:M:LAMBDA` sets the multiple of
  the mean that counts as an outlier (5), and half the range of the sparsities (0.08). Only one-shot
  pruning of a trained model can measure outliers; it writes the result into the config as a map.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, listed, unknown
from sparse_lm.core.units import Pattern

DISTRIBUTIONS = ('uniform', 'er', 'erk')
OUTLIERS = 'owl'
# How far rounding to whole units may move a density, as a fraction of that density.
MAX_ROUNDING_ERROR = 0.1


def unrounded_densities(
  shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: str
) -> dict[str, float]:
  """Returns the density of each parameter, before it is rounded to whole units.

  Args:
    shapes: shapes of the prunable parameters by path.
    sparsity: sparsity of all these parameters together, in [0, 1).
    distribution: name of a distribution, or a map; the module's docstring describes them.

  Raises:
    UserError: the distribution is unknown, or a map does not fit the paths.
  """
  if distribution in DISTRIBUTIONS and not sparsity:
    return dict.fromkeys(shapes, 1.0)  # exactly 1, without rounding errors
  if '=' in distribution:
    return _mapped(shapes, sparsity, distribution)
  if distribution == 'uniform':
    return dict.fromkeys(shapes, 1 - sparsity)
  if distribution in ('er', 'erk'):
    return _erdos_renyi(shapes, 1 - sparsity)
  if distribution.partition(':')[0] == OUTLIERS:
    raise UserError(
      f'config.weight.distribution={distribution!r} measures the inputs of a trained model, which only '
      f'python -m sparse_lm.prune does; valid: {", ".join(DISTRIBUTIONS)}, or a map'
    )
  raise unknown(
    'config.weight.distribution',
    distribution,
    [*DISTRIBUTIONS, OUTLIERS, 'a map such as attention=0.5,mlp=0.9'],
  )


@dataclasses.dataclass(frozen=True)
class Outliers:
  """The distribution 'owl' (Yin et al. 2023, Outlier Weighed Layerwise Sparsity).

  Attributes:
    multiple: a weight is an outlier if `|weight| * norm(input)` exceeds this multiple of the mean over
      its layer.
    spread: half the range of the densities.
  """

  multiple: float = 5.0
  spread: float = 0.08

  @classmethod
  def parse(cls, distribution: str) -> 'Outliers | None':
    """Recognises 'owl' and 'owl:M:LAMBDA'; `None` for other distributions.

    Raises UserError for numbers out of range.
    """
    name, *numbers = distribution.split(':')
    if name != OUTLIERS:
      return None
    match = re.fullmatch(r'(?::(\d+(?:\.\d+)?):(0?\.\d+))?', distribution.removeprefix(name))
    found = match and (cls(*map(float, match.groups())) if numbers else cls())
    if not found or found.multiple <= 0 or not 0 < found.spread < 0.5:
      raise UserError(
        f'config.weight.distribution={distribution!r}: valid: {OUTLIERS}, or {OUTLIERS}:M:LAMBDA with '
        f'M > 0 and 0 < LAMBDA < 0.5, such as {OUTLIERS}:{cls.multiple:g}:{cls.spread:g}'
      )
    return found

  def densities(
    self, outliers: Mapping[str, float], sizes: Mapping[str, int], density: float
  ) -> dict[str, float]:
    """Returns the density of each layer.

    The densities grow linearly with the fraction of outliers, over a range of `2 * spread`, and their
    mean over all weights is `density`.

    Args:
      outliers: fraction of each layer's weights that are outliers, by the name of the layer.
      sizes: number of prunable weights of each layer.
      density: density of all these weights together.

    Raises:
      UserError: a layer would keep more than all of its weights, or none.
    """
    low, high = min(outliers.values()), max(outliers.values())
    scale = 2 * self.spread / (high - low) if high > low else 0.0
    raised = {name: scale * (share - low) for name, share in outliers.items()}
    mean = sum(raised[name] * size for name, size in sizes.items()) / sum(sizes.values())
    found = {name: density + up - mean for name, up in raised.items()}
    for name, kept in found.items():
      if not 0 < kept <= 1:
        raise UserError(
          f'config.weight.distribution={OUTLIERS!r} gives {name} a sparsity of {1 - kept:.4g}; valid: a '
          f'smaller LAMBDA than {self.spread:g} in {OUTLIERS}:M:LAMBDA, or another config.weight.sparsity'
        )
    return found

  def trial(self, sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Returns densities over the whole range, to check that a pattern can express such densities."""
    return self.densities({name: i % 2 for i, name in enumerate(sizes)}, sizes, density)


def as_map(densities: Mapping[str, float]) -> str:
  """Returns the map that gives the parameters of each layer their density, such as 'block_0/=0.5'."""
  return ','.join(f'^{name}/={1 - density:.6f}' for name, density in densities.items())


def _erdos_renyi(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
  """Returns Erdős–Rényi densities that do not exceed 1.

  Parameters whose density would exceed 1 stay dense, and the others share the remaining weights. This is
  repeated until no density exceeds 1.
  """
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  raw = {path: sum(shape[-2:]) / math.prod(shape[-2:]) for path, shape in shapes.items()}
  dense: set[str] = set()
  while True:
    free = [path for path in shapes if path not in dense]
    left = density * sum(sizes.values()) - sum(sizes[path] for path in dense)
    scale = left / sum(raw[path] * sizes[path] for path in free) if free else 0.0
    full = {path for path in free if scale * raw[path] > 1}
    if not full:
      return {path: 1.0 if path in dense else scale * raw[path] for path in shapes}
    dense |= full


def _mapped(
  shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: str
) -> dict[str, float]:
  densities = dict.fromkeys(shapes, 1 - sparsity)
  claimed: set[str] = set()
  for entry in distribution.split(','):
    expression, _, value = entry.strip().rpartition('=')
    try:
      share = float(value)
    except ValueError:
      share = math.nan
    if not 0 <= share < 1:
      raise UserError(
        f'config.weight.distribution entry {entry.strip()!r}: the sparsity is not valid; valid: a number '
        'in [0, 1)'
      )
    found = [
      path for path in shapes if tree.matches((expression,), path, 'config.weight.distribution')
    ]
    if not found:
      raise UserError(
        f'config.weight.distribution entry {entry.strip()!r} matches no prunable parameter; valid: '
        f'an expression that matches one of {listed(list(shapes), expression)}'
      )
    densities |= {path: 1 - share for path in found if path not in claimed}
    claimed.update(found)
  return densities


def _of_whole_units(
  shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: str, units: Pattern
) -> dict[str, float]:
  """Returns the densities of `unrounded_densities`, rounded to whole units.

  Raises:
    UserError: rounding changes a density by more than a tenth of it. The density of all parameters
      together is checked, and for a map the density of the parameters of each entry.
  """
  asked = unrounded_densities(shapes, sparsity, distribution)
  found = units.round_to_units(shapes, asked)
  parts: dict[float | None, list[str]] = {}
  for path in shapes:
    parts.setdefault(asked[path] if '=' in distribution else None, []).append(path)
  for paths in parts.values():
    want, got = (_total({path: shapes[path] for path in paths}, d) for d in (asked, found))
    if abs(got - want) > MAX_ROUNDING_ERROR * want:
      field = 'config.weight.distribution' if '=' in distribution else 'config.weight.sparsity'
      near = _nearest({path: shapes[path] for path in paths}, got, distribution, units)
      raise UserError(
        f'{field}: with whole units, a sparsity of {1 - want:.9g} becomes {1 - got:.9g}; '
        f'valid: for example {near:.9g}'
      )
  return found


def _nearest(
  shapes: dict[str, tuple[int, ...]], density: float, distribution: str, units: Pattern
) -> float:
  """Returns the highest sparsity up to 1 - `density` that whole units can represent."""
  while True:
    if '=' in distribution:
      asked = dict.fromkeys(shapes, density)
    else:
      asked = unrounded_densities(shapes, 1 - density, distribution)
    got = _total(shapes, units.round_to_units(shapes, asked))
    if abs(got - density) <= MAX_ROUNDING_ERROR * density:
      return 1 - density
    density = got


def _total(shapes: dict[str, tuple[int, ...]], density: dict[str, float]) -> float:
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  return sum(density[path] * size for path, size in sizes.items()) / sum(sizes.values())


def targets(
  params: tree.Tree, sparsity: float, distribution: str, dense: tuple[str, ...], units: Pattern
) -> tree.Tree:
  """Returns a tree like `params` with the float32 density of each prunable leaf; other leaves are `None`.

  Args:
    params: arrays or shape structs; leaves that are `None` are ignored.
    sparsity: fraction of all prunable weights in `params` that is dropped, in [0, 1).
    distribution: name of a distribution, or a map; the module's docstring describes them.
    dense: regular expressions for the paths of leaves that always stay dense.
    units: the pattern, which says what is kept or dropped as a whole. Leaves without units of this
      pattern stay dense.

  Raises:
    UserError: no leaf can be pruned, the distribution is not valid, or rounding to whole units changes
      the densities too much.
  """
  shapes = {
    path: leaf.shape
    for path, leaf in tree.named(params).items()
    if leaf.ndim >= 1
    and not tree.matches(dense, path, 'config.weight.dense')
    and units.covers(path, leaf.shape)
  }
  if not shapes:
    raise UserError(
      f'config.weight.dense={tuple(dense)} keeps every parameter dense, so there is nothing to prune; '
      'valid: expressions that leave some parameters out'
    )
  units.check(shapes)
  # Densities of whole counts: rounding size * density in float32 gives the count exactly.
  densities = _of_whole_units(shapes, sparsity, distribution, units)
  return tree.map_named(
    lambda path, leaf: jnp.float32(densities[path]) if path in densities else None, params
  )
