"""How much validation loss does weight sparsity cost, and which method costs least?

Dense models, one at equal parameter count to the sparsest models, against static, magnitude, SET,
RigL and STE at several sparsities, over seeds that share initialisation and data.
"""

import pathlib

from experiments.sweep import STE, Run, fixed, grid, product
from sparse_lm.report import plot, results, table

CONFIG = 'configs/ablation.py'
SEEDS = (0, 1)
SPARSITIES = (0.5, 0.8, 0.95)
# Updates of the connections come often enough for a run of 500 steps (the default, every 100 steps,
# is for runs of thousands).
METHODS = {
  'static': {'weight.name': 'static'},
  'magnitude': {'weight.name': 'magnitude', 'weight.period': 10},
  'set': {'weight.name': 'set', 'weight.period': 25},
  'rigl': {'weight.name': 'rigl', 'weight.period': 25},
  'ste': STE,
}
# As many parameters as the 95 % sparse models keep, within 1 % (a test counts them).
SMALL = {'model.width': 32, 'model.hidden': 104}
CAPTION = (
  'Weight sparsity against validation loss: 2 layers of width 64 on bytes of the Python standard '
  "library's source; learning rate (6e-3, tried beside 3e-3) and decay were chosen for the dense model "
  'and are the same in every row; no method was tuned. Training runs with masks: its time is no '
  'claim about packed models'
)


def runs() -> list[Run]:
  """Two dense models, then five methods at three sparsities, over seeds."""
  seeds = grid('seed', SEEDS)
  dense = [Run(CONFIG, overrides, {'method': 'dense', 'sparsity': 0.0}) for overrides in seeds]
  small = [
    Run(CONFIG, overrides, {'method': 'small dense', 'sparsity': 0.0})
    for overrides in product(fixed(SMALL), seeds)
  ]
  sparse = [
    Run(CONFIG, overrides, {'method': method, 'sparsity': overrides['weight.sparsity']})
    for method, fields in METHODS.items()
    for overrides in product(fixed(fields), grid('weight.sparsity', SPARSITIES), seeds)
  ]
  return dense + small + sparse


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Table and figure."""
  columns = [
    table.column(metric)
    for metric in (
      'val_loss',
      'sparsity_prunable',
      'sparsity_total',
      'nonzero_params',
      'flops_forward',
      'flops_forward_ratio',
      'flops_training_ratio',
      'stored_bytes',
      'train_step_ms',
    )
  ]
  frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'dense'})
  sparsity = table.Column('sparsity', 'sparsity', '.0f', '%', 100)
  figure = plot.curves(lines, sparsity, table.column('val_loss'), 'method', {'sparsity': 0.0})
  plot.save(figure, folder, 'sparsity_vs_accuracy')
  return table.write(frame, folder, CAPTION, f'python -m experiments.run {folder.name}')
