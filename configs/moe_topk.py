"""Mixture of experts on the tiny model: each token uses one of eight experts.

Command:  python -m sparse_lm.train --config=configs/moe_topk.py --workdir=results/moe_topk
Time:     38 s on 2 CPU cores, compilation included.
Expected: validation loss 1.877 nats per byte (the dense tiny model: 1.893) at
          1.004 of the forward FLOPs of the dense twin.
Paper:    Switch (Fedus et al. 2021).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Experts are as large as the dense MLP: equal compute, eight times the MLP parameters."""
  config = tiny.get_config()
  config.mlp.update({'name': 'moe_topk', 'experts': 8, 'k': 1})
  return config
