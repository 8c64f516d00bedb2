"""Sparse weights and token gates under one compute budget, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/hybrid.py --workdir=results/hybrid
Time:     53 s on 2 CPU cores, compilation included.
Expected: validation loss 1.874 nats per byte (the dense tiny model: 1.893) at
          0.348 of the forward FLOPs of the dense twin.
Paper:    RigL (Evci et al. 2020) with the gates of SkipNet (Wang et al. 2018).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """RigL at 50 % sparsity, with token gates that hold the forward FLOPs at 35 % of the dense model's."""
  config = tiny.get_config()
  config.weight.update({'name': 'rigl', 'sparsity': 0.5, 'period': 25})
  config.depth.name = 'token_gate'
  config.budget.target = 0.35
  return config
