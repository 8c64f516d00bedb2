"""MoBA (mixture of block attention) on the tiny model: a query attends to 4 of 16 blocks of keys.

Command:  python -m sparse_lm.train --config=configs/moba.py --workdir=results/moba
Time:     31 s on 2 CPU cores, compilation included.
Expected: validation loss 1.875 nats per byte (the dense tiny model: 1.893) at
          0.966 of the forward FLOPs of the dense twin.
Paper:    Lu et al. 2025 (MoBA).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A query reads its own block of 4 keys and the best three earlier ones, a quarter of the context."""
  config = tiny.get_config()
  config.attention.update({'name': 'moba', 'block': 4, 'k': 4})
  return config
