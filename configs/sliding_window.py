"""Sliding-window attention on the tiny model: each query attends to the last 16 positions.

Command:  python -m sparse_lm.train --config=configs/sliding_window.py --workdir=results/sliding_window
Time:     22 s on 2 CPU cores, compilation included.
Expected: validation loss 1.838 nats per byte (the dense tiny model: 1.893) at
          0.960 of the forward FLOPs of the dense twin.
Paper:    Longformer (Beltagy et al. 2020).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A window of 16 positions, a quarter of the context."""
  config = tiny.get_config()
  config.attention.update({'name': 'sliding_window', 'window': 16})
  return config
