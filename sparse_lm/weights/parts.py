"""The methods of a model, whether it has one or several: what each owns and when each is at work.

A method on its own is one part, named ''. Of several methods in one model (see `weights/rules.py`) each
is a part, named as its rule.
"""

from collections.abc import Mapping

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.signals import from_training
from sparse_lm.weights import collect
from sparse_lm.weights.collect import Collected, Gradients
from sparse_lm.weights.method import WeightMethod


def due(method: WeightMethod, step: int) -> tuple[str, ...]:
  """The parts whose masks are updated in a step."""
  return tuple(name for name, part in method.parts.items() if part.due(step))


def at_start(method: WeightMethod) -> dict[str, int]:
  """The parts whose masks are updated before step 0, and the batches that each reads signals of."""
  found = {name: part.batches_at_start for name, part in method.parts.items()}
  return {name: batches for name, batches in found.items() if batches is not None}


def batches_at_start(method: WeightMethod) -> int:
  """Batches of training text that are read before step 0: the most that a part asks for."""
  return max(at_start(method).values(), default=0)


def own(method: WeightMethod, name: str, leaves: Tree) -> Tree:
  """The leaves of a tree like the parameters that a part owns, `None` elsewhere."""
  return tree.map_named(lambda path, leaf: leaf if method.owner(path) == name else None, leaves)


def learns_density(method: WeightMethod, path: str) -> bool:
  """Whether the density of the parameter at `path` is learned, so that it is a gate on its weights."""
  owner = method.owner(path)
  return owner is not None and method.parts[owner].traits.controlled


def densities(method: WeightMethod, target: Mapping[str, float], step: int) -> dict[str, float]:
  """The density of each leaf at `step`, by path, for the final densities in `target`."""
  asked = {path: (method.owner(path), final) for path, final in target.items()}
  # Once for each target of a part: leaves of a uniform distribution share theirs.
  found = {
    (name, final): float(method.parts[name].density(final, step))
    for name, final in set(asked.values())
  }
  return {path: found[key] for path, key in asked.items()}


def backward_densities(
  method: WeightMethod, target: Mapping[str, float], step: int
) -> dict[str, float] | None:
  """The fraction of each leaf that the weight gradient of a step is computed for, by path.

  `None` where that is what the forward pass computes with, for all of them.
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
  """The parts that need signals over several steps."""
  return tuple(name for name, part in method.parts.items() if collect.spanning_steps(part))


def collecting(method: WeightMethod, step: int) -> tuple[str, ...]:
  """The parts that add the gradient of a step to signals over several steps."""
  return tuple(name for name in spanning_steps(method) if method.parts[name].collects(step))


def start_collecting(method: WeightMethod, params: Tree, target: Tree) -> dict[str, Collected]:
  """What is collected at step 0, by part."""
  return {
    name: collect.start(
      collect.spanning_steps(method.parts[name]), params, own(method, name, target)
    )
    for name in spanning_steps(method)
  }


def collect_at_start(method: WeightMethod, params: Tree, target: Tree) -> dict[str, Collected]:
  """Nothing collected yet of the signals that parts need before step 0."""
  return {
    name: collect.start(
      from_training(method.parts[name].traits.needs), params, own(method, name, target)
    )
    for name in at_start(method)
  }


def add(
  collected: dict[str, Collected], step: Gradients, names: tuple[str, ...]
) -> dict[str, Collected]:
  """`collected` with a step added for these parts."""
  return {
    name: collect.add(found, step) if name in names else found for name, found in collected.items()
  }


def forget(collected: dict[str, Collected], names: tuple[str, ...]) -> dict[str, Collected]:
  """`collected` after an update of these parts."""
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
  """The training signals of each of these parts, see `collect.read`."""
  return {
    name: collect.read(method.parts[name], collected.get(name), step, own(method, name, target))
    for name in names
  }
