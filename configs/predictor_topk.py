"""Hidden units behind a predictor that reads half of the input, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/predictor_topk.py --workdir=results/predictor
Time:     29 s on 2 CPU cores, compilation included.
Expected: validation loss 1.727 nats per byte at 0.619 of the forward FLOPs
          of the dense twin (the tiny model: 1.893).
Paper:    Spark (You et al. 2025).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """An eighth of the units, so that up- and down-projection are skipped for the rest."""
  config = tiny.get_config()
  config.mlp.update({'name': 'predictor_topk', 'density': 0.125})
  return config
