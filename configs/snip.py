"""SNIP on the tiny model: pruning before the first step, by the gradient of four batches.

Command:  python -m sparse_lm.train --config=configs/snip.py --workdir=results/snip
Time:     40 s on 2 busy CPU cores, compilation included.
Expected: validation loss 2.169 nats per byte, and 2.132 for the control, --config.weight.shuffle=True.
          With the same initialisation the dense tiny model has 1.796 and configs/static.py 1.780.
Paper:    Lee et al. 2019; the control, Frankle et al. 2021.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside the embedding and the head."""
  config = tiny.get_config()
  config.weight.update({'name': 'snip', 'sparsity': 0.9})
  config.model.init = 'gpt2'  # with a head of zeros all other gradients would be zero
  return config
