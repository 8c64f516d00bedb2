"""Does the default architecture reach a lower loss than nanoGPT's, in nanoGPT's CPU setting?

Place char-rnn's text (1,115,394 bytes) at data/tiny_shakespeare.txt first.
"""

import pathlib

from experiments.study import reproduce
from experiments.sweep import Run
from sparse_lm.report import results, table

SEEDS = (0, 1, 2)
ARCHITECTURES = {
  "nanoGPT's": 'configs/shakespeare_char_nanogpt.py',
  "this project's default": 'configs/shakespeare_char.py',
}
CAPTION = (
  "nanoGPT's CPU setting: 4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps on tiny "
  'Shakespeare. The loss is that of the whole validation split, at the last step and at the best '
  'evaluation'
)


def runs() -> list[Run]:
  """Returns runs of both architectures, over seeds."""
  return [
    Run(config, {'seed': seed}, {'architecture': name})
    for name, config in ARCHITECTURES.items()
    for seed in SEEDS
  ]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table and returns it in Markdown."""
  columns = [
    table.column('val_loss'),
    table.Column('best_val_loss', 'lowest validation loss', '.4f', 'nats/token'),
    *map(table.column, ('params', 'train_step_ms')),
  ]
  frame = table.summarise(lines, ['architecture'], columns)
  return table.write(frame, folder, CAPTION, reproduce(lines, folder))
