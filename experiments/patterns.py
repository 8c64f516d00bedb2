"""How much validation loss do structured patterns cost, at equal sparsity of the same matrices?

The patterns on the MLPs are unstructured, N:M, blocks of 16 and 32, and whole neurons. Those on
attention have whole heads in place of neurons. Magnitude pruning and STE use each pattern, over seeds.
"""

import pathlib

from experiments.study import reproduce
from experiments.sweep import STE, Run
from sparse_lm.report import categories, plot, results, table

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
  f'Patterns at {SPARSITY:.0%} sparsity of the MLPs or of attention, the other matrices dense: 2 '
  "layers of width 64 with 4 heads on bytes of the Python standard library's source, 500 steps. All "
  'rows have the learning rate and the weight decay of the dense model; no method was tuned. Training '
  'applies masks, which saves no time'
)


def runs() -> list[Run]:
  """The dense model, then each pattern in each scope with each method, over seeds."""
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
  """Writes the table and the figure."""
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
    | {'labels': line['labels'] if line['labels']['method'] != 'dense' else {'method': 'dense'}}
    for line in lines
  ]
  figure = categories.dots(
    shown, 'pattern', 'val_loss', 'method', {'method': 'dense'}, panel='scope'
  )
  plot.save(figure, folder, 'patterns')
  return table.write(frame, folder, CAPTION, reproduce(lines, folder))
