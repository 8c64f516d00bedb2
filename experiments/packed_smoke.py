"""Does a packed study run end to end? Small models and 20 steps give no result to quote.

`python -m experiments.run packed_smoke --pack=4` packs on a CPU too.
"""

import dataclasses

from experiments import packed_sweep

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
STUDY = dataclasses.replace(
  packed_sweep.STUDY, config='configs/tiny.py', sparsities=(0.5, 0.9), seeds=(0, 1), common=SHORT
)
runs, report = STUDY.runs, STUDY.report
