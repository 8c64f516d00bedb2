"""How does validation loss rise with weight sparsity in nanoGPT's CPU setting?

The study has 57 runs of 2000 steps. On an accelerator, `python -m experiments.run packed_sweep --pack`
trains the runs of each method as one program. Place char-rnn's text (1,115,394 bytes) at
data/tiny_shakespeare.txt first.
"""

from experiments.comparison import Comparison
from experiments.sweep import STE
from sparse_lm.report.table import Column

STUDY = Comparison(
  config='configs/shakespeare_char.py',
  methods={
    'static': {'weight.name': 'static'},
    'magnitude': {'weight.name': 'magnitude'},
    'SET': {'weight.name': 'set'},
    'RigL': {'weight.name': 'rigl'},
    'STE': STE,
    'Top-KAST': {'weight.name': 'top_kast'},
  },
  sparsities=(0.5, 0.8, 0.95),
  seeds=(0, 1, 2),
  caption=(
    "Weight sparsity in nanoGPT's CPU setting: 4 layers, 4 heads, width 128, context 64, batch 12, "
    '2000 steps on tiny Shakespeare. The loss is that of the whole validation split at the last step. '
    'The learning rate and the weight decay are those of the dense model; no method was tuned. '
    'Training applies masks, which saves no time'
  ),
  columns=(
    'val_loss',
    Column('best_val_loss', 'lowest validation loss', '.4f', 'nats/token'),
    'sparsity_prunable',
    'flops_forward_ratio',
    'flops_training_ratio',
    'packed_step_ms',
  ),
)
runs, report = STUDY.runs, STUDY.report
