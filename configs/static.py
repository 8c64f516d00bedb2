"""Random connections, drawn once, on the tiny model.

Command:  python -m sparse_lm.train --config=configs/static.py --workdir=results/static
Time:     TIME_static on 2 CPU cores, compilation included.
Expected: validation loss METRIC_static nats per byte (the dense tiny model: METRIC_tiny).
Paper:    static baseline of RigL (Evci et al. 2020); rescaling Evci et al. 2022.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """90 % of the weights outside embedding and head dropped."""
  config = tiny.get_config()
  config.weight.update({'name': 'static', 'sparsity': 0.9})
  return config
