"""Checks of the signals that a weight method reads, and of the scores that it returns."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from sparse_lm import signals
from sparse_lm.core import discovery
from sparse_lm.core.errors import Diverged, UserError, unknown
from sparse_lm.core.tree import Tree
from sparse_lm.weights.method import Array, WeightMethod

_PREFIX = 'non_finite_scores/'  # of the metrics that are flags of `non_finite`


@jax.tree_util.register_pytree_with_keys_class
class DeclaredSignals(dict):
  """Signals by name. A name that the method's `needs` does not list raises a UserError.

  JAX maps over it as over a dict.
  """

  def __init__(self, found: Mapping[str, Tree], reader: str, needs: tuple[str, ...]) -> None:
    """Takes the signals, the name of the function that reads them, and the method's `needs`."""
    super().__init__(found)
    self.reader, self.needs = reader, needs

  def __missing__(self, name: str) -> Tree:
    valid = discovery.names(signals.__name__)
    if name not in valid:
      raise unknown(f'signal in {self.reader}:', name, valid)
    raise UserError(
      f'{self.reader} reads the signal {name!r}, which is not among the needs={self.needs} of its '
      f'traits; valid: needs={(*self.needs, name)}'
    )

  def tree_flatten_with_keys(self) -> tuple[list, tuple]:
    """Returns the signals with their keys, and the rest, as JAX asks."""
    names = sorted(self)
    children = [(jax.tree_util.DictKey(name), self[name]) for name in names]
    return children, (tuple(names), self.reader, self.needs)

  @classmethod
  def tree_unflatten(cls, rest: tuple, children: Iterable[Tree]) -> 'DeclaredSignals':
    """Makes the signals from the results of `tree_flatten_with_keys`."""
    names, reader, needs = rest
    return cls(dict(zip(names, children)), reader, needs)


def non_finite(arrays: Mapping[str, Array]) -> dict[str, Array]:
  """Returns for each array whether any of its values is NaN or infinite, bool."""
  return {name: ~jnp.isfinite(array).all() for name, array in arrays.items()}


def as_metrics(flags: Mapping[str, Array]) -> dict[str, Array]:
  """Returns the flags of `non_finite` under names that `split` finds among the metrics of a step."""
  return {f'{_PREFIX}{path}': flag for path, flag in flags.items()}


def split(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, bool]]:
  """Returns the other metrics of a step, and the flags of `non_finite` by path."""
  rest = {name: value for name, value in metrics.items() if not name.startswith(_PREFIX)}
  flags = {name.removeprefix(_PREFIX): bool(metrics[name]) for name in metrics if name not in rest}
  return rest, flags


def raise_for(method: WeightMethod, flags: Mapping[str, bool], when: str) -> None:
  """Raises Diverged if any score is NaN or infinite.

  Args:
    method: the model's weight method.
    flags: results of `non_finite` by path.
    when: when the scores were computed, such as 'at step 3'.
  """
  wrong = [path for path, flag in flags.items() if flag]
  if not wrong:
    return
  owner = method.parts.get(method.owner(wrong[0]), method)
  more = f' (and {len(wrong) - 1} more matrices)' if len(wrong) > 1 else ''
  raise Diverged(
    f'{type(owner).__name__} gives weights of {wrong[0]}{more} scores that are NaN or infinite {when}; '
    'valid: finite scores'
  )
