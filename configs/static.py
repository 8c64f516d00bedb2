"""Static random masks on the tiny model.

Command:  python -m sparse_lm.train --config=configs/static.py --workdir=results/static
Time:     35 s on 2 CPU cores, compilation included.
Expected: validation loss 1.905 nats per byte (the dense tiny model: 1.893).
Paper:    the static baseline of RigL (Evci et al. 2020); rescaled initialisation, Evci et al. 2022.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside the embedding and the head."""
  config = tiny.get_config()
  config.weight.update({'name': 'static', 'sparsity': 0.9})
  return config
