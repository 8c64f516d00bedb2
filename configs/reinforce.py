"""Token gates trained by REINFORCE on the tiny model: each token enters or skips every layer.

Command:  python -m sparse_lm.train --config=configs/reinforce.py --workdir=results/reinforce
Time:     25 s on 2 CPU cores, compilation included.
Expected: validation loss 1.864 nats per byte (the dense tiny model: 1.893) at
          0.601 of the forward FLOPs of the dense twin.
Paper:    BlockDrop (Wu et al. 2018); REINFORCE (Williams 1992).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Sampled gates, held at 60 % of the dense FLOPs."""
  config = tiny.get_config()
  config.depth.update({'name': 'token_gate', 'estimator': 'reinforce'})
  config.budget.target = 0.6
  return config
