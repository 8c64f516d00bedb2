"""Training signals of one step, or averaged over several steps."""

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
  """The parameters and gradients from which the signals of a step are computed.

  Attributes:
    params: the parameters that the model used.
    gradients: gradients of the loss at `params`, of the same structure.
  """

  params: Tree
  gradients: Tree


class Collected(struct.PyTreeNode):
  """Sums of signals over the steps since the last update, for signals that are means over several steps.

  Attributes:
    sums: sums by the name of the signal: float32 trees like the parameters, `None` for leaves that are
      not prunable.
    batches: number of steps in the sums, int32.
  """

  sums: dict[str, Tree]
  batches: Array


def spanning_steps(method: WeightMethod) -> list[str]:
  """The names of the method's signals that are means over several steps."""
  needs = from_training(method.traits.needs)
  return [name for name, signal in needs.items() if signal.batches > 1]


def start(names: Iterable[str], params: Tree, target: Tree) -> Collected:
  """Returns empty sums of these signals, for the leaves with a target density."""
  zeros = jax.tree.map(
    lambda w: jnp.zeros(w.shape, jnp.float32), tree.only(tree.named(target), params)
  )
  return Collected(dict.fromkeys(names, zeros), jnp.int32(0))


def add(collected: Collected, step: Gradients) -> Collected:
  """Adds the signals of one step."""
  signals = from_training(tuple(collected.sums))
  sums = {
    name: jax.tree.map(jnp.add, total, _of_step(signals[name], step, total))
    for name, total in collected.sums.items()
  }
  return Collected(sums, collected.batches + 1)


def means(collected: Collected) -> dict[str, Tree]:
  """Returns the mean of each signal over the added steps."""
  return jax.tree.map(lambda total: total / collected.batches, collected.sums)


def forget(collected: Collected) -> Collected:
  """Returns empty sums, for the steps after an update."""
  return jax.tree.map(jnp.zeros_like, collected)


def read(
  method: WeightMethod, collected: Collected | None, step: Gradients, target: Tree
) -> dict[str, Tree]:
  """Returns the training signals that an update needs, by name: trees like the parameters.

  Args:
    collected: sums that include this step; `None` if no signal is a mean over several steps.
    step: the parameters and gradients of the update's step.
    target: target densities; signals are `None` for leaves without one.
  """
  found = {} if collected is None else means(collected)
  for name, signal in from_training(method.traits.needs).items():
    if name not in found:
      found[name] = _of_step(signal, step, target)
  return found


def _of_step(signal: TrainingSignal, step: Gradients, like: Tree) -> Tree:
  """Computes the signal of one step, for the leaves that are not `None` in `like`."""
  present = tree.named(like)
  return jax.tree.map(
    signal.of_gradient, tree.only(present, step.params), tree.only(present, step.gradients)
  )
