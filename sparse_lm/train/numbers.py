"""The numbers in which packed runs may differ. Packed steps take them as traced scalars.

They are the optimizer's learning rate and weight decay, the numbers of the budget controller, and the
fields that a weight method declares as `traced`, such as the weight of a penalty. A step uses them only
in arithmetic. The optimizer is built from these scalars while the step is traced, so its state has the
same tree structure as in a single run.
"""

import dataclasses
from collections.abc import Mapping

import jax

from sparse_lm.core.ranges import traced_fields
from sparse_lm.train.control import Budget
from sparse_lm.train.optim import Optimizer
from sparse_lm.train.step import Program
from sparse_lm.weights.method import WeightMethod

Number = float | jax.Array


def numbers(program: Program) -> dict[str, float]:
  """Returns the numbers of a program that packed steps trace, by config field."""
  nodes = {'config.optimizer': program.optimizer}
  if program.objective.budget is not None:
    nodes['config.budget'] = program.objective.budget
  nodes |= {_group(name): part for name, part in program.method.parts.items()}
  return {
    f'{group}.{field}': vars(node)[field]
    for group, node in nodes.items()
    for field in traced_fields(type(node))
  }


def with_numbers(program: Program, values: Mapping[str, Number]) -> Program:
  """Returns the program with other numbers, which may be traced.

  Args:
    program: the program.
    values: a number for each name in `numbers(program)`.
  """

  def replaced(group: str, node: Optimizer | Budget | WeightMethod) -> dict[str, Number]:
    return {field: values[f'{group}.{field}'] for field in traced_fields(type(node))}

  objective, optimizer = program.objective, program.optimizer
  method, budget = objective.method, objective.budget
  parts = {
    name: dataclasses.replace(part, **replaced(_group(name), part))
    for name, part in method.parts.items()
  }
  if budget is not None:
    budget = dataclasses.replace(budget, **replaced('config.budget', budget))
  return dataclasses.replace(
    program,
    objective=dataclasses.replace(objective, method=method.with_parts(parts), budget=budget),
    optimizer=dataclasses.replace(optimizer, **replaced('config.optimizer', optimizer)),
  )


def common(program: Program) -> Program:
  """Returns the program with all these numbers zero, which is equal for all runs that can be packed."""
  return with_numbers(program, dict.fromkeys(numbers(program), 0.0))


def _group(part: str) -> str:
  """Returns the config group of a part of the weight method."""
  return f'config.weight.rules.{part}' if part else 'config.weight'
