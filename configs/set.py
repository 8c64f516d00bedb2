"""SET (sparse evolutionary training) on the tiny model.

Command:  python -m sparse_lm.train --config=configs/set.py --workdir=results/set
Time:     41 s on 2 CPU cores, compilation included.
Expected: validation loss 1.932 nats per byte (the dense tiny model: 1.893).
Paper:    Mocanu et al. 2018.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside the embedding and the head."""
  config = tiny.get_config()
  config.weight.update({'name': 'set', 'sparsity': 0.9, 'period': 25})
  return config
