"""The parts of a model's weight method: which parameters each part owns, and when it updates its masks.

A single method is one part with the name ''. If a model has several methods (see `weights/rules.py`),
each of them is a part with the name of its rule.
"""

from collections.abc import Mapping

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.signals import from_training
from sparse_lm.weights import collect
from sparse_lm.weights.collect import Collected, Gradients
from sparse_lm.weights.method import WeightMethod


def due(method: WeightMethod, step: int) -> tuple[str, ...]:
  """The names of the parts whose masks are updated in a step."""
  return tuple(name for name, part in method.parts.items() if part.due(step))


def at_start(method: WeightMethod) -> dict[str, int]:
  """The parts whose masks are updated before step 0, and how many batches each of them reads."""
  found = {name: part.batches_at_start for name, part in method.parts.items()}
  return {name: batches for name, batches in found.items() if batches is not None}


def batches_at_start(method: WeightMethod) -> int:
  """Returns how many batches are read before step 0: as many as the part that needs most."""
  return max(at_start(method).values(), default=0)


def own(method: WeightMethod, name: str, leaves: Tree) -> Tree:
  """Returns the leaves that a part owns, and `None` for the others."""
  return tree.map_named(lambda path, leaf: leaf if method.owner(path) == name else None, leaves)


def learns_density(method: WeightMethod, path: str) -> bool:
  """True if the density of the parameter at `path` is learned."""
  owner = method.owner(path)
  return owner is not None and method.parts[owner].traits.controlled


def densities(method: WeightMethod, target: Mapping[str, float], step: int) -> dict[str, float]:
  """Returns the density of each leaf at `step`, by path, for the final densities in `target`."""
  asked = {path: (method.owner(path), final) for path, final in target.items()}
  # Computed once for each part and target: in a uniform distribution all leaves share their target.
  found = {
    (name, final): float(method.parts[name].density(final, step))
    for name, final in set(asked.values())
  }
  return {path: found[key] for path, key in asked.items()}


def backward_densities(
  method: WeightMethod, target: Mapping[str, float], step: int
) -> dict[str, float] | None:
  """Returns the fraction of each leaf's weight gradient that is computed in a step, by path.

  `None` if all fractions are the densities of the forward pass.
  """
  asked = {path: (method.owner(path), final) for path, final in target.items()}
  found = {
    (name, final): method.parts[name].backward_density(final, step)
    for name, final in set(asked.values())
  }
  if all(fraction is None for fraction in found.values()):
    return None
  as_forward = {path: target[path] for path, key in asked.items() if found[key] is None}
  backward = {path: found[key] for path, key in asked.items() if found[key] is not None}
  return backward | densities(method, as_forward, step)


def spanning_steps(method: WeightMethod) -> tuple[str, ...]:
  """Returns the names of the parts with signals that are averaged over several steps."""
  return tuple(name for name, part in method.parts.items() if collect.spanning_steps(part))


def collecting(method: WeightMethod, step: int) -> tuple[str, ...]:
  """Returns the parts whose signals are averaged over several steps, this step included."""
  return tuple(name for name in spanning_steps(method) if method.parts[name].collects(step))


def start_collecting(method: WeightMethod, params: Tree, target: Tree) -> dict[str, Collected]:
  """Returns the empty sums of signals at step 0, by part."""
  return {
    name: collect.start(
      collect.spanning_steps(method.parts[name]), params, own(method, name, target)
    )
    for name in spanning_steps(method)
  }


def collect_at_start(method: WeightMethod, params: Tree, target: Tree) -> dict[str, Collected]:
  """Returns empty sums of the signals that parts need before step 0, by part."""
  return {
    name: collect.start(
      from_training(method.parts[name].traits.needs), params, own(method, name, target)
    )
    for name in at_start(method)
  }


def add(
  collected: dict[str, Collected], step: Gradients, names: tuple[str, ...]
) -> dict[str, Collected]:
  """Adds a step to the sums of these parts."""
  return {
    name: collect.add(found, step) if name in names else found for name, found in collected.items()
  }


def forget(collected: dict[str, Collected], names: tuple[str, ...]) -> dict[str, Collected]:
  """Empties the sums of these parts, after their update."""
  return {
    name: collect.forget(found) if name in names else found for name, found in collected.items()
  }


def signals(
  method: WeightMethod,
  collected: dict[str, Collected],
  step: Gradients,
  target: Tree,
  names: tuple[str, ...],
) -> dict[str, dict[str, Tree]]:
  """Returns the training signals of each of these parts; see `collect.read`."""
  return {
    name: collect.read(method.parts[name], collected.get(name), step, own(method, name, target))
    for name in names
  }
