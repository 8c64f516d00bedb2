"""How precisely does each budget controller hold token gates at a target for forward FLOPs?

Token gates on the tiny model are held at 0.6 of the dense model's forward FLOPs, with every estimator
and every controller. The forward FLOPs are measured on the validation text after the last step.
"""

import pathlib

from experiments.comparison import with_metric
from experiments.study import reproduce
from experiments.sweep import Run
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.report import categories, plot, results, table
from sparse_lm.train.control import CONTROLLERS

CONFIG = 'configs/token_gate.py'
SEEDS = (0, 1, 2)
TARGET = 0.6
CAPTION = (
  f'Token gates held at {TARGET} of the forward FLOPs of the dense model, configs/tiny.py. FLOPs are '
  'measured on the validation text after the last step'
)


def runs() -> list[Run]:
  """Returns runs of every estimator that a controller can change, with every controller, over seeds."""
  return [
    Run(
      CONFIG,
      {
        'depth.estimator': name,
        'budget.controller': controller,
        'budget.target': TARGET,
        'seed': seed,
      },
      {'estimator': name, 'controller': controller},
    )
    for name, estimator in ESTIMATORS.items()
    if estimator.controlled
    for controller in CONTROLLERS
    for seed in SEEDS
  ]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, and a figure of loss against the FLOPs that each estimator reached."""
  lines = with_metric(lines, 'off', lambda metrics: metrics['flops_forward_ratio'] - TARGET)
  fraction = table.Column('flops_forward_ratio', 'forward FLOPs', '.3f', '× the dense model')
  columns = [
    fraction,
    table.Column('off', 'difference from the target', '+.3f', '× the dense model'),
    table.column('val_loss'),
  ]
  frame = table.summarise(lines, ['estimator', 'controller'], columns)
  shown = [fraction, table.column('val_loss')]
  targets = {fraction.metric: TARGET}
  figure = categories.dots(lines, 'estimator', shown, 'controller', targets=targets)
  plot.save(figure, folder, 'budget_control')
  return table.write(frame, folder, CAPTION, reproduce(lines, folder))
