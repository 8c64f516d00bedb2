"""From a config to the program that it describes, with every check that needs no data."""

from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost
from sparse_lm.runs import configs
from sparse_lm.runs.weight import weight_method
from sparse_lm.train.control import Budget
from sparse_lm.train.distillation import Distillation
from sparse_lm.train.objective import Objective
from sparse_lm.train.optim import Optimizer
from sparse_lm.train.step import Program, shared
from sparse_lm.weights import parts


def build(config: ConfigDict, vocab: int) -> tuple[Program, Tree]:
  """The program and target densities for a vocabulary of that size, without reading the corpus' text.

  Raises UserError where the config describes none.
  """
  configs.check(config)
  model = lm.from_config(config, vocab)
  method, target = weight_method(config.weight, plan_of(model), config.train.steps)
  optimizer = Optimizer.from_config(config, method.traits.masked, method.learned_rates)
  budget, distillation = Budget.from_config(config), Distillation.from_config(config)
  objective = Objective(model, method, budget, distillation, config.train.steps)
  program = Program(objective, optimizer, config.train.accumulation)
  if objective.budget:
    _check_floor(objective, target)
  return shared(program), target


def check_costs(config: ConfigDict) -> None:
  """Refuses a model, or a dense twin, with parameters that no cost is noted for: see `plan.read`.

  Which those are does not depend on the vocabulary, so this runs before any data is read.
  """
  model = lm.from_config(config, vocab=1)
  for one in (model, lm.dense_twin(model)):
    plan_of(one)


def _controlled(spec: Spec) -> list[str]:
  """The settings of the methods that the budget controller can move, at their defaults."""
  found = []
  for slot in slots.LAYER_SLOTS:
    for name in slots.names(slot):
      own = slots.MethodConfig(slot, name, tuple(sorted(slots.defaults(slot, name).items())))
      gating = own.traits(spec).gating
      if gating is not None and gating.controlled:
        found.append(f'config.{slot}.name={name}')
  learned = [
    name for name in slots.names('weight') if slots.method('weight', name).traits.controlled
  ]
  return found + [f'config.weight.name={name}' for name in learned]


def _check_floor(objective: Objective, target: Tree) -> None:
  """Raises UserError for a budget that the gates cannot reach, naming what they don't gate."""
  ledger, dense = objective.costs.ledger, objective.costs.dense
  density = {path: float(final) for path, final in tree.named(target).items()}
  for path in density:
    if parts.learns_density(objective.method, path):
      density[path] = 0.0  # as far as the controller can bring it down
  field = f'config.budget.target={objective.budget.target}'
  gates = any(gate.controlled for m in ledger.values() for gate in m.gates)
  if not gates and not objective.method.traits.controlled:
    raise UserError(
      f'{field} needs what the controller can move (fixed capacities and random gates have rates of '
      f'their own); valid: a learned gate or mask: {", ".join(_controlled(objective.model.spec))}'
    )
  floor = cost.flops_range(ledger, density)[0] / dense
  if objective.budget.target < floor:
    ungated = {
      path: m.flops * density.get(m.kernel, 1.0)
      for path, m in ledger.items()
      if not any(gate.controlled for gate in m.gates)
    }
    largest = sorted(ungated, key=ungated.get, reverse=True)[:3]
    shares = ', '.join(f'{path} {ungated[path] / dense:.3f}' for path in largest)
    raise UserError(
      f'{field} is below {floor:.3f}, what no gate can skip ({shares}, ...); valid: from there to 1'
    )
