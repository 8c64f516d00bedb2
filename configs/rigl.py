"""RigL on the tiny model.

Command:  python -m sparse_lm.train --config=configs/rigl.py --workdir=results/rigl
Time:     39 s on 2 CPU cores, compilation included.
Expected: validation loss 1.903 nats per byte (the dense tiny model: 1.893).
Paper:    Evci et al. 2020.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside the embedding and the head."""
  config = tiny.get_config()
  config.weight.update({'name': 'rigl', 'sparsity': 0.9, 'period': 25})
  return config
