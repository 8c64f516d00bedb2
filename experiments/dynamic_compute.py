"""Do models with input-dependent compute reach a lower loss than dense models of equal FLOPs?

At least one method of each slot is trained at three budgets. Control rows open gates at random at the
same rate, or are smaller dense models. Further rows combine sparse weights with gates under one budget.
All rows use the same seeds, so they share the initialisation and the data.
"""

import functools
import math
import pathlib

from experiments.study import reproduce
from experiments.sweep import Overrides, Run, fixed, grid, product
from sparse_lm.core import tree
from sparse_lm.model import lm
from sparse_lm.plan import cost
from sparse_lm.report import health, plot, results, table
from sparse_lm.runs import configs
from sparse_lm.runs.build import build

CONFIG = 'configs/ablation.py'
MODEL = {'model.layers': 4}
VOCAB = 256
SEEDS = (0, 1, 2)
GATE = {'depth.name': 'token_gate'}
# Fractions of the dense model's forward FLOPs, and the dense models that cost these fractions.
TARGETS = (0.8, 0.6, 0.4)
NARROWER = (
  {'model.width': 56, 'model.hidden': 232},
  {'model.width': 48, 'model.hidden': 192},
  {'model.width': 40, 'model.hidden': 128},
)
EXPERTS = {'mlp.name': 'moe_topk', 'mlp.experts': 8, 'mlp.hidden': 64}
HYBRID = GATE | {'weight.name': 'rigl', 'weight.sparsity': 0.5, 'weight.period': 25}
CAPTION = (
  'Input-dependent compute against validation loss: 4 layers of width 64 on bytes of the Python '
  "standard library's source, 500 steps. The learning rate and the weight decay were chosen for a dense "
  'model of 2 layers and are the same in every row; no method was tuned. FLOPs are charged at the '
  'fraction of open gates that is measured on the validation text. Gates compute everything and mask '
  'it, so their step times are no evidence on speed. The column "training" says whether training sees '
  'later tokens; evaluation is always causal'
)


def runs() -> list[Run]:
  """The dense models, then each method at its budgets, over seeds."""
  rows: list[tuple[str, str, Overrides]] = [('dense', '4 layers', {})]
  rows += [('dense, narrower', f'width {small["model.width"]}', small) for small in NARROWER]
  rows += [('dense, fewer layers', f'{n} of 4 layers', {'model.layers': n}) for n in (3, 2, 1)]
  for name, slot in (('statistical_topk', 'activation'), ('predictor_topk', 'mlp')):
    rows += [
      (name, f'density {d}', {f'{slot}.name': name, f'{slot}.density': d}) for d in (0.5, 0.25, 0.1)
    ]
  rows += [('moe_topk', f'{k} of 8 experts', EXPERTS | {'mlp.k': k}) for k in (3, 2, 1)]
  rows += [
    ('sliding_window', f'window {w}', {'attention.name': 'sliding_window', 'attention.window': w})
    for w in (32, 16, 8)
  ]
  rows += [_held('head_gate', {'attention.name': 'head_gate'}, t) for t in (0.95, 0.9, 0.85)]
  for capacity in (0.5, 0.25, 0.125):
    half = {'depth.name': 'mixture_of_depths', 'depth.layers': '1::2', 'depth.capacity': capacity}
    rows.append(('mixture_of_depths', f'capacity {capacity}', half))
  for estimator in ('straight_through', 'reinforce'):
    learned = GATE | {'depth.estimator': estimator}
    rows += [_held(f'token_gate, {estimator}', learned, target) for target in TARGETS]
  for target in TARGETS:
    random = GATE | {'depth.estimator': 'random', 'depth.open': _random_rate(target)}
    rows.append(('token_gate, random', f'target {target}', random))
  rows += [_held('hybrid: rigl + token_gate', HYBRID, target) for target in (0.4, 0.3, 0.2)]
  return [
    Run(CONFIG, overrides, {'method': method, 'setting': setting, 'training': _training(overrides)})
    for method, setting, row in rows
    for overrides in product(fixed(MODEL | row), grid('seed', SEEDS))
  ]


def _held(method: str, overrides: Overrides, target: float) -> tuple[str, str, Overrides]:
  return method, f'target {target}', overrides | {'budget.target': target}


@functools.cache
def _random_rate(target: float) -> float:
  """Returns the rate at which random token gates must open to use `target` of the dense model's FLOPs."""
  program, masks = build(configs.load(CONFIG, MODEL | GATE), VOCAB)
  closed, opened = cost.flops_range(program.costs.ledger, tree.named(masks))
  return round((target * program.costs.dense - closed) / (opened - closed), 4)


def _training(overrides: Overrides) -> str:
  """Describes the causality of training, as the traits of the methods declare it."""
  model = lm.from_config(configs.load(CONFIG, overrides), VOCAB)
  if not lm.causal(model)['train']:
    return 'sees later tokens'
  return 'causal' if lm.batch_independent(model)['train'] else 'causal, sequences compete'


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, a figure of loss against FLOPs, and figures of the routers' health."""
  lines = [_beside_dense(line, lines) for line in lines]
  flops = table.Column('flops_of_dense', 'active forward FLOPs', '.3f', '× the dense model')
  columns = [
    table.column('val_loss'),
    flops,
    *map(table.column, ('flops_forward', 'flops_forward_ratio', 'flops_training_ratio')),
    table.column('active'),
    *map(table.column, ('params', 'active_params', 'sparsity_prunable')),
    *map(table.column, ('stored_bytes', 'train_step_ms')),
  ]
  frame = table.summarise(lines, ['method', 'setting', 'training'], columns, {'method': 'dense'})
  figure = plot.curves(
    lines,
    flops,
    table.column('val_loss'),
    'method',
    baseline={'method': 'dense'},
    reference=['dense, narrower'],
  )
  plot.save(figure, folder, 'dynamic_compute')
  _router_health(lines, folder)
  return table.write(frame, folder, CAPTION, reproduce(lines, folder))


def _beside_dense(line: results.Line, lines: list[results.Line]) -> results.Line:
  """Adds the FLOPs of the line as a fraction of those of the dense model with the same seed."""
  dense = next(
    (
      other['metrics']['flops_forward']
      for other in lines
      if other['labels']['method'] == 'dense' and other['seed'] == line['seed']
    ),
    float('nan'),
  )
  ratio = line['metrics']['flops_forward'] / dense
  return line | {'metrics': line['metrics'] | {'flops_of_dense': ratio}}


def _router_health(lines: list[results.Line], folder: pathlib.Path) -> None:
  """Draws the router health of the mixtures of experts at each budget, for the first seed."""
  for line in lines:
    metrics = folder / 'runs' / line['run'] / 'metrics.jsonl'
    # The folder may hold lines without the folders of their runs, which hold the logs.
    routed = math.isfinite(line['metrics'].get('max_violation', math.nan))
    if routed and line['seed'] == SEEDS[0] and metrics.exists():
      setting = line['labels']['setting'].split()[0]
      plot.save(health.router_health(metrics), folder, f'router_health_top{setting}')
