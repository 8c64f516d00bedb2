"""How does validation loss fall off with weight sparsity, over seeds, in nanoGPT's CPU setting?

57 runs of 2000 steps. On an accelerator `python -m experiments.run packed_sweep --pack` trains the runs
of each method as one program. The text is read from data/tiny_shakespeare.txt (char-rnn's, 1,115,394
bytes), where you placed it.
"""

import pathlib
from collections.abc import Sequence

from experiments.sweep import STE, Overrides, Run, fixed, grid, product
from sparse_lm.report import plot, results, table

CONFIG = 'configs/shakespeare_char.py'
SEEDS = (0, 1, 2)
SPARSITIES = (0.5, 0.8, 0.95)
METHODS = {
  'static': {'weight.name': 'static'},
  'magnitude': {'weight.name': 'magnitude'},
  'set': {'weight.name': 'set'},
  'rigl': {'weight.name': 'rigl'},
  'ste': STE,
  'top-kast': {'weight.name': 'top_kast'},
}
CAPTION = (
  "nanoGPT's CPU setting: 4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps on tiny "
  'Shakespeare; loss over the whole validation split at the last step. Learning rate and decay are those '
  'of the dense model in every row; no method was tuned. Training runs with masks, and packed runs share '
  'a device: their time is no claim about sparse models'
)


def planned(
  config: str, sparsities: Sequence[float], seeds: Sequence[int], common: Overrides
) -> list[Run]:
  """Dense runs, then every method at every sparsity, each over the seeds."""
  over_seeds = product(fixed(common), grid('seed', seeds))
  dense = [Run(config, overrides, {'method': 'dense', 'sparsity': 0.0}) for overrides in over_seeds]
  return dense + [
    Run(config, overrides, {'method': method, 'sparsity': overrides['weight.sparsity']})
    for method, fields in METHODS.items()
    for overrides in product(fixed(fields), grid('weight.sparsity', sparsities), over_seeds)
  ]


def runs() -> list[Run]:
  """Three dense runs, then six methods at three sparsities over three seeds."""
  return planned(CONFIG, SPARSITIES, SEEDS, {})


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table and the figure, and returns the table in Markdown."""
  columns = [
    table.column('val_loss'),
    table.Column('best_val_loss', 'lowest validation loss', '.4f', 'nats/token'),
    *map(table.column, ('sparsity_prunable', 'flops_forward_ratio', 'flops_training_ratio')),
  ]
  frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'dense'})
  figure = plot.curves(lines, 'sparsity', table.column('val_loss'), 'method', {'sparsity': 0.0})
  plot.save(figure, folder, 'loss_by_sparsity')
  return table.write(frame, folder, CAPTION, f'python -m experiments.run {folder.name} --pack')
