"""RigL on the tiny model.

Command:  python -m sparse_lm.train --config=configs/rigl.py --workdir=results/rigl
Time:     TIME_rigl on 2 CPU cores, compilation included.
Expected: validation loss METRIC_rigl nats per byte (the dense tiny model: METRIC_tiny).
Paper:    Evci et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """90 % of the weights outside embedding and head dropped."""
  config = tiny.get_config()
  config.weight.update({'name': 'rigl', 'sparsity': 0.9, 'period': 25})
  return config
