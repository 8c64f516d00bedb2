"""Learned gates on the weights, held at half of the dense FLOPs, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/l0.py --workdir=results/l0
Time:     47 s on 2 CPU cores, compilation included.
Expected: validation loss 2.203 nats per byte at 0.489 of the forward FLOPs of the dense twin (the tiny
          model: 1.893; fixed random connections, configs/static.py, do better).
Paper:    Louizos et al. 2018.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A hard concrete gate on every weight."""
  config = tiny.get_config()
  config.weight.name = 'l0'
  # Gates that start alike move alike: a strong penalty keeps the price from overshooting for them all.
  config.budget.update({'target': 0.5, 'weight': 10.0, 'rate': 0.01})
  return config
