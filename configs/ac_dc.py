"""AC/DC on the tiny model.

Command:  python -m sparse_lm.train --config=configs/ac_dc.py --workdir=results/ac_dc
Time:     30 s on 2 CPU cores, compilation included.
Expected: validation loss 2.018 nats per byte (the dense tiny model: 1.893).
Paper:    Peste et al. 2021.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """90 % of the weights outside embedding and head dropped in the end, in phases of 25 steps before."""
  config = tiny.get_config()
  config.weight.update({'name': 'ac_dc', 'sparsity': 0.9})
  return config
