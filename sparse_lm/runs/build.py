"""Building the training program of a config, with all checks that need no data."""

from ml_collections import ConfigDict

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError, listed
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
  """Builds the program and the final density of each prunable parameter, without reading the text.

  Args:
    config: a complete config.
    vocab: size of the vocabulary.

  Raises UserError if the config is not valid.
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
  """Raises UserError if a matrix of the model or of its dense twin has no cost in the ledger.

  The check does not depend on the vocabulary, so it runs before any data is read.
  """
  model = lm.from_config(config, vocab=1)
  for one in (model, lm.dense_twin(model)):
    plan_of(one)


def _controlled(spec: Spec) -> list[str]:
  """Returns the config settings of all methods whose compute the budget controller can change."""
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
  """Raises UserError for a budget below the cost of what no gate can skip."""
  ledger, dense = objective.costs.ledger, objective.costs.dense
  density = {path: float(final) for path, final in tree.named(target).items()}
  for path in density:
    if parts.learns_density(objective.method, path):
      density[path] = 0.0  # the lowest density that the controller can reach
  field = f'config.budget.target={objective.budget.target}'
  gates = any(gate.controlled for m in ledger.values() for gate in m.gates)
  if not gates and not objective.method.traits.controlled:
    raise UserError(
      f'{field} needs a learned gate or mask, whose compute the controller can change (fixed capacities '
      f'and random gates have fixed rates); valid: {listed(_controlled(objective.model.spec))}'
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
      f'{field} is below {floor:.3f}, the share of the compute that no gate can skip ({shares}, ...); '
      f'valid: {floor:.3f} to 1'
    )
