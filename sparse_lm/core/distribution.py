"""One target sparsity shared out over the leaves. Runs on the host, in float64.

uniform   every leaf at the target.
er, erk   Erdős–Rényi (SET, Mocanu et al. 2018; kernel form RigL, Evci et al. 2020): density in
          proportion to (in + out) / (in * out), so that small and narrow leaves stay denser. The two
          are the same on matrices, which is all that a transformer has; both names are in use.
a map     `'attention=0.5,mlp=0.9'`: path expressions with their own sparsity, the first match wins,
          the other leaves take the target.
"""

import math

import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.units import Pattern

DISTRIBUTIONS = ('uniform', 'er', 'erk')
COARSEST = 0.1  # of a density: how far rounding to whole units may lead from what was asked for


def solve(
  shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: str
) -> dict[str, float]:
  """The density of each path, as far as arithmetic goes: whole units round it.

  Args:
    sparsity: over all paths together, in [0, 1).
    distribution: see the module.

  Raises UserError for an unknown distribution, or a map that does not fit the paths.
  """
  if distribution in DISTRIBUTIONS and not sparsity:
    return dict.fromkeys(shapes, 1.0)  # whatever rounding makes of a share of everything
  if '=' in distribution:
    return _mapped(shapes, sparsity, distribution)
  if distribution == 'uniform':
    return dict.fromkeys(shapes, 1 - sparsity)
  if distribution in ('er', 'erk'):
    return _erdos_renyi(shapes, 1 - sparsity)
  raise unknown(
    'config.weight.distribution',
    distribution,
    [*DISTRIBUTIONS, 'a map such as attention=0.5,mlp=0.9'],
  )


def _erdos_renyi(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
  """Leaves whose share would exceed 1 stay dense, and the rest shares what is left, until none does."""
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
        f'config.weight.distribution entry {entry.strip()!r}: sparsity is to be a number in [0, 1)'
      )
    found = [
      path for path in shapes if tree.matches((expression,), path, 'config.weight.distribution')
    ]
    if not found:
      raise UserError(
        f'config.weight.distribution entry {entry.strip()!r} matches no prunable parameter; there are: '
        + ', '.join(shapes)
      )
    densities |= {path: 1 - share for path in found if path not in claimed}
    claimed.update(found)
  return densities


def _of_whole_units(
  shapes: dict[str, tuple[int, ...]], sparsity: float, distribution: str, units: Pattern
) -> dict[str, float]:
  """The densities that whole units come to.

  Raises UserError where they are off by more than a tenth of the density asked for: of all matrices
  together, or of those of an entry of a map.
  """
  asked = solve(shapes, sparsity, distribution)
  found = units.round_to_units(shapes, asked)
  parts: dict[float | None, list[str]] = {}
  for path in shapes:
    parts.setdefault(asked[path] if '=' in distribution else None, []).append(path)
  for paths in parts.values():
    want, got = (_total({path: shapes[path] for path in paths}, d) for d in (asked, found))
    if abs(got - want) > COARSEST * want:
      field = 'config.weight.distribution' if '=' in distribution else 'config.weight.sparsity'
      near = _nearest({path: shapes[path] for path in paths}, got, distribution, units)
      raise UserError(
        f'{field}: whole units cannot come to a sparsity of {1 - want:.9g}, only to {1 - got:.9g}; '
        f'valid: such as {near:.9g}'
      )
  return found


def _nearest(
  shapes: dict[str, tuple[int, ...]], density: float, distribution: str, units: Pattern
) -> float:
  """The sparsity closest to 1 - `density` from below that whole units come to."""
  while True:
    if '=' in distribution:
      asked = dict.fromkeys(shapes, density)
    else:
      asked = solve(shapes, 1 - density, distribution)
    got = _total(shapes, units.round_to_units(shapes, asked))
    if abs(got - density) <= COARSEST * density:
      return 1 - density
    density = got


def _total(shapes: dict[str, tuple[int, ...]], density: dict[str, float]) -> float:
  sizes = {path: math.prod(shape) for path, shape in shapes.items()}
  return sum(density[path] * size for path, size in sizes.items()) / sum(sizes.values())


def targets(
  params: tree.Tree, sparsity: float, distribution: str, dense: tuple[str, ...], units: Pattern
) -> tree.Tree:
  """A tree like `params` with the float32 density of each prunable leaf, `None` for the others.

  Args:
    params: arrays or shape structs, `None` for what is not considered at all.
    sparsity: dropped over all prunable weights in `params` together, in [0, 1).
    distribution: see the module.
    dense: path expressions of what stays dense whatever the distribution says.
    units: what is kept or dropped as a whole; leaves that have none stay dense too.

  Raises:
    UserError: nothing is left to prune, `solve` refuses, or whole units cannot come to the densities.
  """
  shapes = {
    path: leaf.shape
    for path, leaf in tree.named(params).items()
    if leaf.ndim >= 1
    and not tree.matches(dense, path, 'config.weight.dense')
    and units.covers(path, leaf.shape)
  }
  if not shapes:
    raise UserError(f'config.weight.dense={tuple(dense)} leaves nothing to prune')
  units.check(shapes)
  # Of a whole count, so that rounding size * density in float32 gives it back.
  densities = _of_whole_units(shapes, sparsity, distribution, units)
  return tree.map_named(
    lambda path, leaf: jnp.float32(densities[path]) if path in densities else None, params
  )
