"""Variables that change once for each optimizer step, by what all of the step's tokens did.

A module that assigns to a variable of its own changes it in every forward pass: once for each microbatch,
so that later microbatches read what earlier ones left. A module whose state follows from the whole step
sows what is to be added up instead, and a rule for what becomes of the variable. The training step adds
up the totals and applies the rule after the gradients: no forward pass reads what its own step counts.
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
  """What becomes of a variable after an optimizer step.

  Attributes:
    total: arrays, added up over the microbatches of the step. Devices that share a batch run one program
      over it, so their part is in it already.
    rule: `(value, total) -> value`; comparable, as a function of a module or a frozen dataclass is.
    collection: of the variable.
    pooled: whether the totals of all modules with an equal rule are added up before it is applied.
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
  """Has a variable of the module become `rule(value, total)` when the optimizer step is done.

  To be called in training alone. A module that is called twice in a step adds up both totals. The other
  arguments are those of `StepUpdate`.
  """
  update = StepUpdate(total, rule, collection, pooled)
  module.sow(UPDATES, name, update, init_fn=lambda: None, reduce_fn=_plus)


def updated(model_state: Tree, updates: Tree) -> Tree:
  """The collections after a step.

  Args:
    model_state: variables by collection and module.
    updates: what modules sowed, by module, added up over the microbatches.
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
