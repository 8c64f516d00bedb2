"""What does structure cost? Validation loss of patterns at equal sparsity of the same matrices.

Unstructured, N:M, blocks of 16 and 32 and whole neurons on the MLPs; the same and whole heads on
attention; for magnitude and STE, over seeds.
"""

import pathlib

from experiments.sweep import STE, Run
from sparse_lm.report import plot, results, table

CONFIG = 'configs/ablation.py'
MODEL = {'model.heads': 4, 'model.kv_heads': 4}
SEEDS = (0, 1, 2)
SPARSITY = 0.75
METHODS = {
  'magnitude': {'weight.name': 'magnitude', 'weight.period': 10},
  'ste': STE,
}
STAYS_DENSE = ('embed', 'head', 'norm', 'bias', 'router')
SCOPES = {
  'MLP': (('unstructured', '2:8', 'block:16', 'block:32', 'neuron'), ('attention',)),
  'attention': (('unstructured', '2:8', 'block:16', 'block:32', 'head'), ('mlp',)),
}
CAPTION = (
  f'Patterns at {SPARSITY:.0%} sparsity of the MLPs or of attention, the rest dense: 2 layers of width '
  "64 with 4 heads on bytes of the Python standard library's source, 500 steps; learning rate and decay "
  'were chosen for a dense model and no row was tuned. Training runs with masks: its time is no claim '
  'about packed models'
)


def runs() -> list[Run]:
  """The dense model, then each pattern of each scope by each method."""
  dense = {'method': 'dense', 'scope': 'none', 'pattern': 'none'}
  rows = [(dense, {})]
  for scope, (patterns, kept_dense) in SCOPES.items():
    for pattern in patterns:
      for method, fields in METHODS.items():
        labels = {'method': method, 'scope': scope, 'pattern': pattern}
        weight = {
          'weight.pattern': pattern,
          'weight.sparsity': SPARSITY,
          'weight.dense': STAYS_DENSE + kept_dense,
        }
        rows.append((labels, weight | fields))
  return [
    Run(CONFIG, MODEL | fields | {'seed': seed}, labels)
    for labels, fields in rows
    for seed in SEEDS
  ]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Table and figure."""
  columns = [
    table.column(metric)
    for metric in (
      'val_loss',
      'sparsity_prunable',
      'sparsity_total',
      'flops_forward_ratio',
      'flops_training_ratio',
      'stored_bytes',
      'train_step_ms',
    )
  ]
  frame = table.summarise(lines, ['method', 'scope', 'pattern'], columns, {'method': 'dense'})
  shown = [
    line
    | {'labels': {'method': labels['method'], 'units': f'{labels["scope"]}, {labels["pattern"]}'}}
    for line in lines
    for labels in [line['labels']]
  ]
  figure = plot.dots(shown, 'units', 'val_loss', 'method', {'method': 'dense'})
  plot.save(figure, folder, 'patterns')
  return table.write(frame, folder, CAPTION, f'python -m experiments.run {folder.name}')
