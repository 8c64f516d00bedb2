"""`python -m sparse_lm.cost --config=FILE`: predicts FLOPs, bytes and parameters without training."""

import math

from ml_collections import ConfigDict
from tabulate import tabulate

from sparse_lm.commands.config_arguments import from_command_line
from sparse_lm.commands.parser import Parser, one_line
from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.plan import cost
from sparse_lm.runs import cost_report
from sparse_lm.runs.build import build
from sparse_lm.runs.setup import Setup, data_of, loaded
from sparse_lm.train.step import Program
from sparse_lm.weights import parts


def matmuls(program: Program, target: Tree) -> str:
  """Returns a Markdown table of all matmuls with their forward FLOPs, dense and with sparsity."""
  densities = {path: float(density) for path, density in tree.named(target).items()}
  rows = [
    (
      path,
      m.flops,
      densities.get(m.kernel, 1.0),
      math.prod(gate.planned for gate in m.gates),
      cost.forward_flops({path: m}, densities),
    )
    for path, m in program.costs.ledger.items()
  ]
  header = ('matmul', 'dense FLOPs/token', 'kernel density', 'open gates', 'FLOPs/token')
  return tabulate(rows, header, tablefmt='github', floatfmt=('', ',.0f', '.4f', '.4f', ',.0f'))


def summary(report: dict[str, float]) -> str:
  """Returns a Markdown table of the totals beside those of the dense twin."""
  dense_flops = report['flops_forward'] / report['flops_forward_ratio']
  rows = [
    ('parameters', f'{report["nonzero_params"]:,}', f'{report["dense_params"]:,}'),
    ('active parameters per token', f'{report["active_params"]:,}', '-'),
    ('sparsity of prunable weights', f'{report["sparsity_prunable"]:.2%}', '0 %'),
    ('sparsity of all weights', f'{report["sparsity_total"]:.2%}', '0 %'),
    (
      'stored bytes, mask bits included',
      f'{report["stored_bytes"]:,}',
      f'{report["dense_bytes"]:,}',
    ),
    ('forward FLOPs per token', f'{report["flops_forward"]:,.0f}', f'{dense_flops:,.0f}'),
    ('forward FLOPs / dense twin', f'{report["flops_forward_ratio"]:.4f}', '1'),
    (
      'forward FLOPs per token, causal pairs only',
      f'{report["flops_forward_causal"]:,.0f}',
      f'{report["flops_forward_causal"] / report["flops_forward_causal_ratio"]:,.0f}',
    ),
    (
      'forward FLOPs / dense twin, causal pairs only',
      f'{report["flops_forward_causal_ratio"]:.4f}',
      '1',
    ),
    ('training FLOPs per token', f'{report["flops_training"]:,.0f}', f'{3 * dense_flops:,.0f}'),
    ('training FLOPs / dense twin', f'{report["flops_training_ratio"]:.4f}', '1'),
    (
      'training FLOPs per token, parent runs included',
      f'{report["flops_training_total"]:,.0f}',
      f'{3 * dense_flops:,.0f}',
    ),
    (
      'training FLOPs / dense twin, parent runs included',
      f'{report["flops_training_total_ratio"]:.4f}',
      '1',
    ),
  ]
  return tabulate(rows, ('', 'this config', 'dense twin'), tablefmt='github', disable_numparse=True)


def budget(program: Program, target: Tree) -> str:
  """Returns a sentence on what `config.budget` changes in the tables, or '' without a budget."""
  own = program.objective.budget
  if own is None:
    return ''
  densities = {path: float(density) for path, density in tree.named(target).items()}
  dense = program.costs.dense
  most = cost.forward_flops(program.costs.ledger, densities) / dense
  return (
    f'config.budget.target={own.target:g}: training moves the learned gates or masks until the forward '
    f'FLOPs are {own.target:g} of those of the dense twin, {own.target * dense:,.0f} per token. The '
    f'tables above are without the budget, at {most:.4f} of the dense twin.'
  )


def predict(config: ConfigDict) -> tuple[Program, Tree, dict[str, float]]:
  """Returns the program of a config, its final densities, and its predicted costs.

  A parent run or a teacher that the config names is loaded.
  """
  data = data_of(config)
  program, target = build(config, data.tokenizer.vocab_size)
  run = Setup(config, data, program, target, **loaded(config, program, data))
  final = {path: float(density) for path, density in tree.named(run.final).items()}
  passes = 1 + parts.batches_at_start(program.method) / config.train.steps
  own = cost_report.predicted(program, final) + run.meter().teacher * passes
  before = run.inherited.over(cost_report.tokens(config, config.train.steps))
  return program, run.final, cost_report.report(program, run.final, work=before.plus(own))


@one_line
def main() -> None:
  """Prints the predicted costs of a config.

  Gates are charged as the config plans them. A gate whose rate is learned is charged as always open, and
  the last line says at how many FLOPs a budget holds it.
  """
  parser = Parser('python -m sparse_lm.cost')
  _, config = from_command_line(parser)
  program, target, report = predict(config)
  found = matmuls(program, target), summary(report), budget(program, target)
  print(*filter(None, found), sep='\n\n')


if __name__ == '__main__':
  main()
