"""Mixture of depths on the tiny model: an eighth of the tokens enters every second layer.

Command:  python -m sparse_lm.train --config=configs/mixture_of_depths.py --workdir=results/mod
Time:     17 s on 2 CPU cores, compilation included.
Expected: validation loss 1.907 nats per byte (the dense tiny model: 1.893) at
          0.584 of the forward FLOPs of the dense twin.
Paper:    Raposo et al. 2024.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Training selects tokens by top-k, evaluation by a causal predictor."""
  config = tiny.get_config()
  config.depth.update({'name': 'mixture_of_depths', 'layers': '1::2', 'capacity': 0.125})
  return config
