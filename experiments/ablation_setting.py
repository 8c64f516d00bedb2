"""Which setting for `make ablation` has a small spread over seeds and a large effect of sparsity?

Only dense models and fixed random masks (static) are trained here, on seeds that the study
`sparsity_vs_accuracy` of `make ablation` does not use. No other method takes part in the choice. It is
based on two numbers: the largest standard deviation over seeds of any row, and the difference in
validation loss between static masks and the dense model.
"""

import pathlib

import pandas as pd
from tabulate import tabulate

from experiments.study import reproduce
from experiments.sweep import Overrides, Run, fixed, grid, product
from sparse_lm.report import results, table
from sparse_lm.runs import configs

CONFIG = 'configs/ablation.py'
CAPTION = (
  'Dense models and static masks in candidate settings for make ablation, on seeds of no other table. '
  'Fields that are not listed are those of configs/ablation.py'
)
# The fields that settings change, and their heads in the table of settings.
FIELDS = {
  'model.layers': 'layers',
  'model.width': 'width',
  'model.hidden': 'hidden',
  'model.heads': 'heads',
  'model.init': 'initialisation',
  'data.context': 'context (tokens)',
  'data.batch': 'batch (sequences)',
  'train.steps': 'steps',
  'optimizer.learning_rate': 'learning rate',
  'optimizer.final': 'final rate (fraction)',
  'optimizer.warmup': 'warm-up (fraction)',
  'optimizer.b2': 'b2',
  'optimizer.weight_decay': 'weight decay',
  'optimizer.ema': 'average (decay)',
}
SEEDS = (100, 101, 102)
SPARSITIES = (0.8, 0.95)
# Settings that were tried at other sparsities.
TRIED = {
  'short 2000 heads high': (0.8, 0.95, 0.9),
  'decay': (0.8, 0.95, 0.9),
  'one layer flat': (0.8, 0.95, 0.9),
  'one layer 4000': (0.8, 0.9),
  'one layer heads': (0.8, 0.9),
  'one layer heads gpt2': (0.8, 0.9),
  'one layer heads batch 16': (0.8, 0.9),
  'one layer heads 3000': (0.8, 0.9),
  'one layer heads gpt2 3000': (0.8, 0.9),
  'one layer heads gpt2 128': (0.8, 0.9),
  'one layer heads gpt2 48': (0.8, 0.9),
  'one layer heads gpt2 3500': (0.8, 0.9),
}
_NARROW = {'model.width': 32, 'model.hidden': 128}
_SHORT = {'data.context': 32}
_STEADY = {'optimizer.b2': 0.99, 'optimizer.warmup': 0.1}
_HEADS = {'model.heads': 8, 'model.kv_heads': 8}
_FLAT = _STEADY | {'optimizer.final': 0.01}
_ONE_HEADS = {'model.layers': 1} | _SHORT | _FLAT | _HEADS
_GPT2 = {'model.init': 'gpt2'}


def _setting(learning_rate: float, ema: float, steps: int) -> Overrides:
  optimizer = {'optimizer.learning_rate': learning_rate, 'optimizer.ema': ema}
  return {**optimizer, 'train.steps': steps, 'train.eval_every': steps}


SETTINGS: dict[str, Overrides] = {
  'before': _setting(6e-3, 0.0, 500),
  'averaged': _setting(3e-3, 0.98, 500),
  'averaged 1000': _setting(3e-3, 0.99, 1000),
  'averaged 1000 low': _setting(1.5e-3, 0.99, 1000),
  'narrow 1000': _setting(3e-3, 0.99, 1000) | _NARROW,
  'narrow 2000': _setting(3e-3, 0.99, 2000) | _NARROW,
  'averaged 1000 high': _setting(6e-3, 0.99, 1000),
  'narrow 2000 high': _setting(1e-2, 0.99, 2000) | _NARROW,
  'short 2000 high': _setting(1e-2, 0.99, 2000) | _SHORT,
  'averaged 1000 highest': _setting(1e-2, 0.99, 1000),
  'few 2000': _setting(6e-3, 0.99, 2000) | {'data.batch': 4},
  'short 2000 steady': _setting(6e-3, 0.99, 2000) | _SHORT | _STEADY,
  'short 2000 steady high': _setting(1e-2, 0.99, 2000) | _SHORT | _STEADY,
  'short 2000 long average': _setting(1e-2, 0.997, 2000) | _FLAT | _SHORT,
  'short 2000 heads high': _setting(1e-2, 0.99, 2000) | _FLAT | _SHORT | _HEADS,
  'decay': _setting(1e-2, 0.99, 2000) | _FLAT | _SHORT | _HEADS | {'optimizer.weight_decay': 1.0},
  'narrow short 4000': _setting(6e-3, 0.99, 4000) | _NARROW | _SHORT | _STEADY,
  'one layer 2000': _setting(1e-2, 0.99, 2000) | {'model.layers': 1} | _SHORT | _STEADY,
  'one layer flat': _setting(1e-2, 0.99, 2000) | {'model.layers': 1} | _SHORT | _FLAT,
  'one layer 4000': _setting(1e-2, 0.99, 4000) | {'model.layers': 1} | _SHORT | _FLAT,
  'one layer heads': _setting(1e-2, 0.99, 4000) | _ONE_HEADS,
  'one layer heads gpt2': _setting(1e-2, 0.99, 4000) | _ONE_HEADS | _GPT2,
  'one layer heads batch 16': (
    _setting(1e-2, 0.99, 4000) | _ONE_HEADS | {'data.context': 16, 'data.batch': 16}
  ),
  'one layer heads 3000': _setting(1e-2, 0.99, 3000) | _ONE_HEADS,
  'one layer heads gpt2 3000': _setting(1e-2, 0.99, 3000) | _ONE_HEADS | _GPT2,
  'one layer heads gpt2 128': (
    _setting(1e-2, 0.99, 4000) | _ONE_HEADS | _GPT2 | {'model.hidden': 128}
  ),
  'one layer heads gpt2 48': (
    _setting(1e-2, 0.99, 4000) | _ONE_HEADS | _GPT2 | {'model.width': 48, 'model.hidden': 192}
  ),
  'one layer heads gpt2 3500': _setting(1e-2, 0.99, 3500) | _ONE_HEADS | _GPT2,
}
CHOSEN = 'one layer heads'


def runs() -> list[Run]:
  """A dense model and static masks in every setting."""
  found = []
  for name, fields in SETTINGS.items():
    models = [('dense', 0.0, fixed())]
    models += [
      ('static', sparsity, fixed({'weight.name': 'static', 'weight.sparsity': sparsity}))
      for sparsity in TRIED.get(name, SPARSITIES)
    ]
    for method, sparsity, model in models:
      labels = {'setting': name, 'method': method, 'sparsity': sparsity}
      overrides = product(fixed(fields), model, grid('seed', SEEDS))
      found += [Run(CONFIG, each, labels) for each in overrides]
  return found


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table of all rows; returns the two criteria of every setting, then that table."""
  columns = [table.column('val_loss')]
  frame = table.summarise(lines, ['setting', 'method', 'sparsity'], columns, {'method': 'dense'})
  full = table.write(frame, folder, CAPTION, reproduce(lines, folder))
  return f'{_criteria(frame)}\n\n{full}'


def _criteria(frame: pd.DataFrame) -> str:
  """Returns a Markdown table of the fields, the largest spread and the gaps of every setting."""
  found = []
  for setting, rows in frame.groupby('setting', sort=False):
    fields = configs.flat(configs.load(CONFIG, SETTINGS[setting]))
    cells = {'setting': setting} | {head: fields[f] for f, head in FIELDS.items()}
    cells['largest standard deviation (nats/token)'] = f'{rows["val_loss_std"].max():.4f}'
    for _, row in rows[rows['method'] == 'static'].iterrows():
      head = f'static less dense at {row["sparsity"]:.0%} (nats/token)'
      cells[head] = f'{row["val_loss_delta_mean"]:+.3f}'
    found.append(cells)
  return tabulate(found, headers='keys', tablefmt='pipe', disable_numparse=True)
