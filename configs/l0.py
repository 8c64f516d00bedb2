"""L0 regularisation on the tiny model: a learned gate on every weight.

Command:  python -m sparse_lm.train --config=configs/l0.py --workdir=results/l0
Time:     47 s on 2 CPU cores, compilation included.
Expected: validation loss 2.203 nats per byte at 0.489 of the forward FLOPs of the dense twin (the tiny
          model: 1.893). Static random masks, configs/static.py, reach a lower loss.
Paper:    Louizos et al. 2018.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Hard concrete gates, held at half of the forward FLOPs of the dense model."""
  config = tiny.get_config()
  config.weight.name = 'l0'
  # All gates start with one value and move together: a strong penalty keeps the price from overshooting.
  config.budget.update({'target': 0.5, 'weight': 10.0, 'rate': 0.01})
  return config
