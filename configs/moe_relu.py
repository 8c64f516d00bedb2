"""ReMoE on the tiny model: a ReLU router over eight experts, whose positive outputs select experts.

Command:  python -m sparse_lm.train --config=configs/moe_relu.py --workdir=results/moe_relu
Time:     50 s on 2 CPU cores, compilation included.
Expected: validation loss 1.838 nats per byte (the dense tiny model: 1.893) at
          0.998 of the forward FLOPs of the dense twin.
Paper:    ReMoE (Wang et al. 2024).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A token visits two experts of 256 units on average, which is the compute of the dense MLP."""
  config = tiny.get_config()
  config.mlp.update({'name': 'moe_relu', 'experts': 8, 'k': 2, 'hidden': 256})
  return config
