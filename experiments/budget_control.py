"""Does the budget controller hold its target, whatever the estimator of the gates?

Token gates on the tiny model held at 0.6 of the dense forward FLOPs by each controller; what they let
through is measured on the validation text after the last step.
"""

import pathlib

from experiments.sweep import Run
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.report import plot, results, table
from sparse_lm.train.control import CONTROLLERS

CONFIG = 'configs/token_gate.py'
SEEDS = (0, 1, 2)
TARGET = 0.6
CAPTION = (
  f'Forward FLOPs of token gates held at {TARGET} of the dense model, measured on the validation text '
  'at the end: configs/tiny.py'
)


def runs() -> list[Run]:
  """Each estimator that the controller can move, under each controller, over seeds."""
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
  """The table, and a figure of what each estimator ended at."""
  lines = [
    line | {'metrics': line['metrics'] | {'off': line['metrics']['flops_forward_ratio'] - TARGET}}
    for line in lines
  ]
  fraction = table.Column('flops_forward_ratio', 'forward FLOPs', '.3f', '× the dense model')
  columns = [fraction, table.Column('off', 'off target', '+.3f'), table.column('val_loss')]
  frame = table.summarise(lines, ['estimator', 'controller'], columns)
  figure = plot.curves(lines, fraction, table.column('val_loss'), 'estimator')
  plot.save(figure, folder, 'budget_control')
  return table.write(frame, folder, CAPTION, f'python -m experiments.run {folder.name}')
