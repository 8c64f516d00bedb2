"""SNIP on the tiny model: pruned before the first step, by the gradient of four batches.

Command:  python -m sparse_lm.train --config=configs/snip.py --workdir=results/snip
Time:     40 s on 2 CPU cores that others used too, compilation included.
Expected: validation loss 2.169 nats per byte; 2.132 with --config.weight.shuffle=True, the control
          (the dense tiny model with the same initialisation: 1.796; configs/static.py with it: 1.780).
Paper:    Lee et al. 2019; the control, Frankle et al. 2021.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """90 % of the weights outside embedding and head dropped."""
  config = tiny.get_config()
  config.weight.update({'name': 'snip', 'sparsity': 0.9})
  config.model.init = 'gpt2'  # a head that starts at zero would leave all else without a gradient
  return config
