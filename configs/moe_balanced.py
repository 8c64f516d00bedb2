"""DeepSeekMoE on the tiny model: small experts with balanced scores, and one shared expert.

Command:  python -m sparse_lm.train --config=configs/moe_balanced.py --workdir=results/moe_balanced
Time:     41 s on 2 CPU cores, compilation included.
Expected: validation loss 1.804 nats per byte (the dense tiny model: 1.893) at
          0.982 of the forward FLOPs of the dense twin.
Paper:    DeepSeekMoE (Dai et al. 2024); balancing without an auxiliary loss (Wang et al. 2024).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """A token visits 4 of 32 experts of 96 units and a shared one: 480 units; the dense MLP has 512."""
  config = tiny.get_config()
  config.mlp.update(
    {'name': 'moe_balanced', 'experts': 8, 'k': 1, 'split': 4, 'shared': 1, 'hidden': 384}
  )
  return config
