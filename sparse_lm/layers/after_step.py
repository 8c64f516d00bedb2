"""Variables that a module updates once per optimizer step, from statistics of all tokens of the step.

If a module assigned to its variable in the forward pass, the variable would change once per microbatch,
and later microbatches would read the changed value. Instead, the module sows a statistic and an update
rule. The training step sums the statistic over the microbatches and applies the rule after the
gradients are computed, so no forward pass reads a value that its own step has changed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree

UPDATES = 'updates'


class StepUpdate(struct.PyTreeNode):
  """The update of a variable after an optimizer step.

  Attributes:
    total: arrays that are summed over the microbatches of the step. Devices that share a batch run one
      program, so the sums already include all devices.
    rule: `(value, total) -> value`. It must support `==`, as module-level functions and frozen
      dataclasses do.
    collection: collection of the variable.
    pooled: whether the totals of all modules with an equal rule are summed before the rule is applied.
  """

  total: Tree
  rule: Callable[[jax.Array, Tree], jax.Array] = struct.field(pytree_node=False)
  collection: str = struct.field(pytree_node=False)
  pooled: bool = struct.field(pytree_node=False)


def after_step(
  module: nn.Module,
  collection: str,
  name: str,
  total: Tree,
  rule: Callable[[jax.Array, Tree], jax.Array],
  pooled: bool = False,
) -> None:
  """Schedules the update `rule(value, total)` of a module's variable for the end of the optimizer step.

  Call this only in training. If a module is called twice in a step, both totals are summed. `StepUpdate`
  documents the other arguments.
  """
  update = StepUpdate(total, rule, collection, pooled)
  module.sow(UPDATES, name, update, init_fn=lambda: None, reduce_fn=_plus)


def updated(model_state: Tree, updates: Tree) -> Tree:
  """Returns the collections after an optimizer step.

  Args:
    model_state: variables by collection and module.
    updates: the sowed `StepUpdate` values by module, summed over the microbatches.
  """
  leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: isinstance(x, StepUpdate))
  pools: dict[Callable[[jax.Array, Tree], jax.Array], Tree] = {}
  for _, update in leaves:
    if update.pooled:
      pools[update.rule] = _plus(pools.get(update.rule), update.total)
  found = {f'{update.collection}/{tree.path_name(path)}': update for path, update in leaves}

  def after(path: str, value: jax.Array) -> jax.Array:
    if path not in found:
      return value
    update = found[path]
    total = pools[update.rule] if update.pooled else update.total
    return update.rule(value, total).astype(value.dtype)

  return tree.map_named(after, model_state)


def _plus(before: Tree, new: Tree) -> Tree:
  return new if before is None else jax.tree.map(jnp.add, before, new)
