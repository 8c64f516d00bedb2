"""Movement pruning of the trained tiny model.

Command:  python -m sparse_lm.train --config=configs/tiny.py --workdir=results/tiny
          python -m sparse_lm.train --config=configs/movement.py --workdir=results/movement \\
            --config.init_from=results/tiny
Time:     25 s on 2 busy CPU cores, compilation included.
Expected: validation loss 1.950 nats per byte. On the same machine its parent has 1.880, and magnitude
          pruning in as many steps reaches 2.049.
Paper:    Sanh et al. 2020, section 3.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Prunes 90 % of the weights outside the embedding and the head, along a cubic ramp."""
  config = tiny.get_config()
  config.weight.update({'name': 'movement', 'sparsity': 0.9})
  config.optimizer.learning_rate = 1e-3
  config.train.steps = 250
  return config
