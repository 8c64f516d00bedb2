"""Does a packed study run end to end? Small models, two seeds, 20 steps: no result to quote.

`python -m experiments.run packed_smoke --pack=4` packs on a CPU too.
"""

from experiments import packed_sweep as study
from experiments.sweep import Run

CONFIG = 'configs/tiny.py'
SHORT = {
  'model.layers': 1,
  'model.width': 32,
  'model.hidden': 64,
  'model.heads': 2,
  'model.kv_heads': 2,
  'train.steps': 20,
  'train.eval_every': 10,
  'train.log_every': 5,
}
report = study.report


def runs() -> list[Run]:
  """Every method at two sparsities over two seeds, and the dense model."""
  return study.planned(CONFIG, (0.5, 0.9), (0, 1), SHORT)
