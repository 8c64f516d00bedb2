"""How much validation loss does weight sparsity cost, and which method costs least?

Dense models, one at equal parameter count to the sparsest models, against static masks, magnitude
pruning and RigL at two sparsities, over seeds that share initialisation and data.
`ablation_setting` says how the setting was chosen.
"""

from experiments.comparison import Comparison

# Half of the width with half of the heads, so that its heads are as wide as those of the large model.
SMALL = {'model.width': 32, 'model.hidden': 270, 'model.heads': 4, 'model.kv_heads': 4}

STUDY = Comparison(
  config='configs/sparsity_vs_accuracy.py',
  dense={'dense': {}, 'small dense': SMALL},
  methods={
    'static': {'weight.name': 'static'},
    'magnitude': {'weight.name': 'magnitude'},
    'RigL': {'weight.name': 'rigl'},
  },
  sparsities=(0.8, 0.9),
  seeds=(20, 21, 22, 23),
  caption=(
    'Weight sparsity against validation loss: 1 layer of width 64 with 8 heads on bytes of the Python '
    "standard library's source. The learning rate, the averaging of weights, the heads and the number "
    'of steps were chosen with the dense model and static masks on other seeds (ablation_setting) and '
    'are the same in every row; no method was tuned. Training applies masks, which saves no time'
  ),
  columns=(
    'val_loss',
    'sparsity_prunable',
    'nonzero_params',
    'flops_forward_ratio',
    'flops_training_ratio',
    'stored_bytes',
    'train_step_ms',
  ),
)
runs, report = STUDY.runs, STUDY.report
