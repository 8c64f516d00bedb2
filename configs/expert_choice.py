"""Expert choice on the tiny model: eight experts choose their tokens.

Command:  python -m sparse_lm.train --config=configs/expert_choice.py --workdir=results/expert_choice
Time:     41 s on 2 CPU cores, compilation included.
Expected: validation loss 1.884 nats per byte (the dense tiny model: 1.893) at
          0.985 of the forward FLOPs of the dense twin.
Paper:    Zhou et al. 2022.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Each token visits one expert on average. Evaluation is causal, training is not."""
  config = tiny.get_config()
  config.mlp.update({'name': 'expert_choice', 'experts': 8, 'visits': 1.0})
  return config
