"""Token gates on the tiny model: each token enters or skips every layer.

Command:  python -m sparse_lm.train --config=configs/token_gate.py --workdir=results/token_gate
Time:     21 s on 2 CPU cores, compilation included.
Expected: validation loss 1.829 nats per byte (the dense tiny model: 1.893) at
          0.596 of the forward FLOPs of the dense twin.
Paper:    SkipNet (Wang et al. 2018).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Straight-through gates, held at 60 % of the dense FLOPs."""
  config = tiny.get_config()
  config.depth.name = 'token_gate'
  config.budget.target = 0.6
  return config
