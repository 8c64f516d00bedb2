"""Building the weight method of a config, and the final density of every prunable parameter."""

import jax
from ml_collections import ConfigDict

from sparse_lm.core import distribution, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.model import slots
from sparse_lm.plan.plan import ModelPlan
from sparse_lm.weights import rules
from sparse_lm.weights.method import WeightMethod
from sparse_lm.weights.rules import Rule, Rules


def groups_of_parts(weight: ConfigDict) -> dict[str, tuple[str, ConfigDict]]:
  """Returns for each part of the weight method (see `weights/parts.py`) its config group and fields."""
  if not weight.order:
    return {'': ('config.weight', weight)}
  return {name: (f'config.weight.rules.{name}', weight.rules[name]) for name in weight.order}


def weight_method(weight: ConfigDict, plan: ModelPlan, steps: int) -> tuple[WeightMethod, Tree]:
  """Builds the weight method, or the methods of all rules, and their final densities.

  Args:
    weight: `config.weight`.
    plan: the model's plan.
    steps: optimizer steps of the whole run.

  Returns:
    The method, and a tree like the parameters with float32 densities, `None` = dense.

  Raises UserError if the fields of the config are not valid.
  """
  if not weight.order:
    method = _method(weight, plan, steps)
    return method, _target(weight, weight.dense, plan.params, method)
  prunable = [
    path
    for path, leaf in tree.named(plan.params).items()
    if leaf.ndim >= 1 and not tree.matches(weight.dense, path, 'config.weight.dense')
  ]
  nodes = {name: node for name, (_, node) in groups_of_parts(weight).items()}
  owned, notes = rules.owners({name: node.match for name, node in nodes.items()}, prunable)
  made, target = [], jax.tree.map(lambda _: None, plan.params)
  for name, node in nodes.items():
    with rules.fields_of(name):
      method = _method(node, plan, steps)
      own = tree.only(owned[name], plan.params)
      _check_covered(node, own, method)
      target = rules.joined(plan.params, target, _target(node, (), own, method))
    made.append(Rule(name, method, owned[name]))
  return Rules(steps, tuple(made), notes, groups=plan.units), target


def check_one_shot(method: WeightMethod, weight: ConfigDict) -> None:
  """Raises UserError if a method cannot prune trained models with these fields."""
  for part, (group, fields) in groups_of_parts(weight).items():
    if not method.parts[part].one_shot:
      classes = {other: slots.method('weight', other) for other in slots.names('weight')}
      able = [other for other, cls in classes.items() if cls(total_steps=1).one_shot]
      raise UserError(
        f'{group}.name={fields.name!r} does not prune trained models; valid: {", ".join(able)}'
      )
  method.check_one_shot()


def _method(node: ConfigDict, plan: ModelPlan, steps: int) -> WeightMethod:
  """Builds the method that `config.weight`, or one of its rules, names."""
  method = slots.method('weight', node.name)(
    total_steps=steps, groups=plan.units, **slots.fields(node)
  )
  method.check()
  return method


def _check_covered(node: ConfigDict, own: Tree, method: WeightMethod) -> None:
  leaves = tree.named(own)
  if not any(method.units.covers(path, leaf.shape) for path, leaf in leaves.items()):
    raise UserError(
      f'config.weight.match={node.match} matches {", ".join(leaves)}, and none of them has units that '
      f'config.weight.name={node.name!r} could prune'
    )


def _target(node: ConfigDict, dense: tuple[str, ...], params: Tree, method: WeightMethod) -> Tree:
  """Returns the final densities of the prunable parameters."""
  target = distribution.targets(params, node.sparsity, node.distribution, dense, method.units)
  if method.traits.controlled and any(float(d) < 1 for d in tree.named(target).values()):
    raise UserError(
      f'config.weight.sparsity={node.sparsity} with config.weight.distribution={node.distribution!r}: '
      f'{node.name} learns its sparsity; valid: 0 and no map (set config.budget.target or a price)'
    )
  if method.traits.masked:
    return target
  if node.sparsity:
    raise UserError(
      f'config.weight.sparsity={node.sparsity} needs a method; config.weight.name={node.name!r} prunes '
      f'nothing; valid: {", ".join(slots.names("weight"))}'
    )
  return jax.tree.map(lambda _: None, target)
