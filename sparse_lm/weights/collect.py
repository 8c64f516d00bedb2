"""Training signals: of the step of an update alone, or over the steps before it."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sparse_lm.core import tree
from sparse_lm.core.signal import TrainingSignal
from sparse_lm.core.tree import Tree
from sparse_lm.signals import from_training
from sparse_lm.weights.method import Array, WeightMethod


class Gradients(NamedTuple):
  """What a step's signals are read from.

  Attributes:
    params: as the model saw them.
    gradients: of the loss at `params`, like them.
  """

  params: Tree
  gradients: Tree


class Collected(struct.PyTreeNode):
  """Signals that span several steps, of the steps since the last update.

  Attributes:
    sums: by signal, float32 trees like the parameters, `None` where a leaf is not prunable.
    batches: how many steps were added, int32.
  """

  sums: dict[str, Tree]
  batches: Array


def spanning_steps(method: WeightMethod) -> list[str]:
  """The signals of a method that are means over several steps."""
  needs = from_training(method.traits.needs)
  return [name for name, signal in needs.items() if signal.batches > 1]


def start(names: Iterable[str], params: Tree, target: Tree) -> Collected:
  """Nothing collected yet of these signals, for the leaves with a target."""
  zeros = jax.tree.map(
    lambda w: jnp.zeros(w.shape, jnp.float32), tree.only(tree.named(target), params)
  )
  return Collected(dict.fromkeys(names, zeros), jnp.int32(0))


def add(collected: Collected, step: Gradients) -> Collected:
  """`collected` with the signals of one more step."""
  signals = from_training(tuple(collected.sums))
  sums = {
    name: jax.tree.map(jnp.add, total, _of_step(signals[name], step, total))
    for name, total in collected.sums.items()
  }
  return Collected(sums, collected.batches + 1)


def means(collected: Collected) -> dict[str, Tree]:
  """The mean of each signal over the steps that were added."""
  return jax.tree.map(lambda total: total / collected.batches, collected.sums)


def forget(collected: Collected) -> Collected:
  """Nothing collected again, after an update."""
  return jax.tree.map(jnp.zeros_like, collected)


def read(
  method: WeightMethod, collected: Collected | None, step: Gradients, target: Tree
) -> dict[str, Tree]:
  """The training signals that an update needs, by name: trees like the parameters.

  Args:
    collected: with this step added; `None` where no signal spans several steps.
    step: the step of the update.
    target: tells which leaves are prunable; signals have `None` for the others.
  """
  found = {} if collected is None else means(collected)
  for name, signal in from_training(method.traits.needs).items():
    if name not in found:
      found[name] = _of_step(signal, step, target)
  return found


def _of_step(signal: TrainingSignal, step: Gradients, like: Tree) -> Tree:
  """The signal of one step, for the leaves that `like` has."""
  present = tree.named(like)
  return jax.tree.map(
    signal.of_gradient, tree.only(present, step.params), tree.only(present, step.gradients)
  )
