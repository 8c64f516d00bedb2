"""Statistical top-k of the hidden units, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/statistical_topk.py --workdir=results/stat
Time:     19 s on 2 CPU cores, compilation included.
Expected: validation loss 1.748 nats per byte (the dense tiny model: 1.893) at
          0.739 of the forward FLOPs of the dense twin.
Paper:    Spark (You et al. 2025).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """An eighth of the hidden units would exceed the threshold if they were normally distributed."""
  config = tiny.get_config()
  config.activation.update({'name': 'statistical_topk', 'density': 0.125})
  return config
