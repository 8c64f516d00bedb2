"""Top-k attention on the tiny model: each query attends to its 8 best keys.

Command:  python -m sparse_lm.train --config=configs/topk_keys.py --workdir=results/topk_keys
Time:     24 s on 2 CPU cores, compilation included.
Expected: validation loss 1.916 nats per byte (the dense tiny model: 1.893) at
          0.973 of the forward FLOPs of the dense twin.
Paper:    Gupta et al. 2021.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Attention computes all scores and reads an eighth of the values."""
  config = tiny.get_config()
  config.attention.update({'name': 'topk_keys', 'k': 8})
  return config
