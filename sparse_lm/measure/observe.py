"""Statistics of masks and gates, per leaf and gate, and their summary for tables."""

import statistics
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree

GATES = 'gates/'  # prefix of the metrics that are open fractions of gates


def _count(new: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.mean(new), jnp.mean(new != old)


@jax.jit
def _counts(masks: Tree, before: Tree) -> Tree:
  return jax.tree.map(_count, masks, before)


@jax.jit
def _counts_of_each(masks: Tree, before: Tree) -> Tree:
  return jax.tree.map(jax.vmap(_count), masks, before)


def connections(masks: Tree, before: Tree) -> dict[str, float]:
  """Returns `density/<path>`, and `flips/<path>`: the fraction of mask bits that differ from `before`."""
  return _by_path(jax.device_get(_counts(masks, before)))


def connections_of_each(masks: Tree, before: Tree, runs: int) -> list[dict[str, float]]:
  """Returns `connections` for each of several runs, which are the leading axis of the masks."""
  counted = jax.device_get(_counts_of_each(masks, before))
  return [_by_path(tree.at_index(counted, number)) for number in range(runs)]


def _by_path(counted: Tree) -> dict[str, float]:
  observed: dict[str, float] = {}
  for path, value in tree.named(counted).items():
    leaf, _, which = path.rpartition('/')
    observed[f'{"density" if which == "0" else "flips"}/{leaf}'] = float(value)
  return observed


def activity(observed: dict[str, float]) -> dict[str, float]:
  """Returns the measured open fraction of each gate, by the gate's path."""
  return {
    name.removeprefix(GATES): value for name, value in observed.items() if name.startswith(GATES)
  }


def scalars(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Converts metrics to numbers by name; a vector becomes `name/0`, `name/1`, ..."""
  found = {}
  for name, value in metrics.items():
    if np.ndim(value):
      found |= {f'{name}/{i}': float(item) for i, item in enumerate(value)}
    else:
      found[name] = float(value)
  return found


def summary(observed: dict[str, float]) -> dict[str, float]:
  """Returns the means over layers of their statistics: 'active', 'dead', 'entropy', 'drop_rate', ..."""
  found: dict[str, list[float]] = {}
  for name, value in observed.items():
    what = name.rpartition('/')[2]
    if not name.startswith(GATES) and not what.isdigit():
      found.setdefault(what, []).append(value)
  return {what: statistics.fmean(values) for what, values in found.items()}
