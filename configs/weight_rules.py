"""Two weight methods in the tiny model: magnitude 2:4 on the MLPs, RigL with blocks on attention.

Command:  python -m sparse_lm.train --config=configs/weight_rules.py --workdir=results/weight_rules
Time:     47 s on 2 CPU cores, compilation included; 26 s without.
Expected: validation loss 1.980 nats per byte at half of the forward FLOPs of the dense twin (the tiny
          model: 1.893). With blocks of 8 it is 1.952.
Paper:    magnitude, Zhu and Gupta 2017; RigL, Evci et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes half of the weights of the MLPs and three quarters of those of attention."""
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
