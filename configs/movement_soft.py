"""Soft movement pruning of the trained tiny model: a threshold on learned scores, with a penalty.

Command:  python -m sparse_lm.train --config=configs/tiny.py --workdir=results/tiny
          python -m sparse_lm.train --config=configs/movement_soft.py --workdir=results/movement_soft \\
            --config.init_from=results/tiny
Time:     25 s on 2 busy CPU cores, compilation included.
Expected: validation loss 1.829 nats per byte at 88.6 % sparsity of the prunable weights. On the same
          machine its parent has 1.880.
Paper:    Sanh et al. 2020, section 4.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """The penalty on the scores determines the sparsity; the config does not set it."""
  config = tiny.get_config()
  config.weight.update({'name': 'movement_soft', 'price': 30.0, 'learned_rate': 100.0})
  config.optimizer.learning_rate = 1e-3
  config.train.steps = 250
  return config
