"""The model of the studies of patterns, one-shot pruning and dynamic compute: dozens of runs in minutes.

Command:  python -m sparse_lm.train --config=configs/ablation.py --workdir=results/ablation
          python -m experiments.run patterns
Time:     10 s alone on 2 CPU cores, after a first run has compiled.
Expected: 2.040 nats per byte (three seeds) on the standard library's source.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """2 layers of width 64, 500 steps of 512 bytes."""
  config = base.get_config()
  config.data.update({'context': 64, 'batch': 8})
  config.model.update({'layers': 2, 'width': 64, 'hidden': 256, 'heads': 2, 'kv_heads': 2})
  config.optimizer.update({'learning_rate': 6e-3, 'b2': 0.95, 'weight_decay': 0.3})
  config.train.update({'steps': 500, 'log_every': 50, 'eval_every': 500, 'checkpoint_every': 500})
  return config
