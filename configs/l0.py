"""Learned gates on the weights, held at half of the dense FLOPs, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/l0.py --workdir=results/l0
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A hard concrete gate on every weight."""
  config = tiny.get_config()
  config.weight.name = 'l0'
  config.budget.target = 0.5
  return config
