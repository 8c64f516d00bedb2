"""Two weight methods in the tiny model: 2:4 by magnitude on the MLPs, RigL on blocks of attention.

Command:  python -m sparse_lm.train --config=configs/weight_rules.py --workdir=results/weight_rules
Time:     47 s on 2 CPU cores, 26 s once it has been compiled.
Expected: validation loss 1.980 nats per byte at half of the forward FLOPs of the dense twin (the tiny
          model: 1.893). Blocks of 8 lose less: 1.952.
Paper:    magnitude, Zhu and Gupta 2017; RigL, Evci et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Half of the MLPs' weights and three quarters of attention's dropped."""
  config = tiny.get_config()
  config.weight.order = ('mlp', 'attention')
  config.weight.rules.mlp = {'name': 'magnitude', 'pattern': '2:4', 'sparsity': 0.5, 'period': 10}
  config.weight.rules.attention = {
    'name': 'rigl',
    'pattern': 'block:16',
    'sparsity': 0.75,
    'period': 25,
  }
  return config
