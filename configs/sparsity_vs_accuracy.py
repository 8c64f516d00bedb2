"""The model of `make ablation`: small enough for 32 runs in minutes on two CPU cores.

Command:  python -m sparse_lm.train --config=configs/sparsity_vs_accuracy.py --workdir=results/first
          python -m experiments.run sparsity_vs_accuracy
Time:     16 s on one of two busy CPU cores, after a first run has compiled. The study takes 4 min 53 s
          on both.
Expected: validation loss 1.609 nats per byte on the standard library's source (mean of four seeds,
          standard deviation 0.001).
"""

from ml_collections import ConfigDict

from configs import ablation


def get_config() -> ConfigDict:
  """1 layer of width 64, 8 heads, 4000 steps of 256 bytes: the choice of `ablation_setting`."""
  config = ablation.get_config()
  config.data.context = 32
  config.optimizer.update({'learning_rate': 1e-2, 'b2': 0.99, 'warmup': 0.1, 'final': 0.01})
  config.optimizer.ema = 0.99
  config.model.update({'layers': 1, 'heads': 8, 'kv_heads': 8})
  config.train.update({'steps': 4000, 'eval_every': 4000, 'checkpoint_every': 4000})
  return config
