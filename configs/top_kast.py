"""Top-KAST on the tiny model.

Command:  python -m sparse_lm.train --config=configs/top_kast.py --workdir=results/top_kast
Time:     35 s on 2 CPU cores, compilation included.
Expected: validation loss 2.038 nats per byte (the dense tiny model: 1.893). Without a penalty it is
          2.037, and with the default penalty of 1e-4, which is too strong for this model, 2.354.
Paper:    Jayakumar et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside embedding and head; 55 % of them receive a gradient."""
  config = tiny.get_config()
  config.weight.update({'name': 'top_kast', 'sparsity': 0.9, 'period': 25, 'penalty_weight': 1e-5})
  return config
