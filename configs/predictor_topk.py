"""Predicted top-k on the tiny model: a predictor that reads half of the input selects hidden units.

Command:  python -m sparse_lm.train --config=configs/predictor_topk.py --workdir=results/predictor
Time:     29 s on 2 CPU cores, compilation included.
Expected: validation loss 1.727 nats per byte (the dense tiny model: 1.893) at
          0.619 of the forward FLOPs of the dense twin.
Paper:    Spark (You et al. 2025).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Each token computes an eighth of the hidden units, in the up- and in the down-projection."""
  config = tiny.get_config()
  config.mlp.update({'name': 'predictor_topk', 'density': 0.125})
  return config
