"""Layer gates on four small layers: each layer is kept or removed as a whole.

Command:  python -m sparse_lm.train --config=configs/layer_gate.py --workdir=results/layer_gate
Time:     21 s on 2 CPU cores, compilation included.
Expected: validation loss 2.049 nats per byte (the dense tiny model: 1.893) at
          0.767 of the forward FLOPs of the dense twin.
Paper:    CoFi (Xia et al. 2022).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Hard concrete gates, held at 0.77 of the dense FLOPs: the cost of three of the four layers."""
  config = tiny.get_config()
  config.model.update({'layers': 4, 'width': 64, 'hidden': 256})
  config.depth.update({'name': 'layer_gate', 'estimator': 'hard_concrete'})
  config.budget.target = 0.77
  return config
