"""Top-KAST on the tiny model.

Command:  python -m sparse_lm.train --config=configs/top_kast.py --workdir=results/top_kast
Time:     XX s on 2 CPU cores, compilation included.
Expected: validation loss X nats per byte (the dense tiny model: 1.893).
Paper:    Jayakumar et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """90 % of the weights outside embedding and head dropped; 55 % get a gradient."""
  config = tiny.get_config()
  config.weight.update({'name': 'top_kast', 'sparsity': 0.9, 'period': 25})
  return config
