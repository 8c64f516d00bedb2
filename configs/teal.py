r"""A gated model whose linear layers ignore small inputs, without training for it (TEAL).

Command:  python -m sparse_lm.train --config=configs/teal.py --workdir=results/teal
          python -m sparse_lm.prune --workdir=results/teal --out=results/teal_50 \
            --config.site.density=0.5
Time:     35 s on 2 CPU cores, compilation included; the second command takes 10 s.
Expected: validation loss 1.887 nats per byte; 1.796 before the second command.
Paper:    TEAL (Liu et al. 2024).
"""

from ml_collections import ConfigDict

from configs import gated


def get_config() -> ConfigDict:
  """Training is dense, because thresholds are 0 until the second command calibrates them."""
  config = gated.get_config()
  config.site = ConfigDict({'name': 'teal', 'density': 0.5})
  return config
