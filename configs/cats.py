r"""A gated model whose small hidden units are zero, without training for it (CATS).

Command:  python -m sparse_lm.train --config=configs/cats.py --workdir=results/cats
          python -m sparse_lm.prune --workdir=results/cats --out=results/cats_50 \
            --config.activation.density=0.5
Time:     35 s on 2 CPU cores, compilation included; the second command takes 10 s.
Expected: validation loss 1.807 nats per byte; 1.796 before the second command.
Paper:    CATS (Lee et al. 2024).
"""

from ml_collections import ConfigDict

from configs import gated


def get_config() -> ConfigDict:
  """Training is dense, because thresholds are 0 until the second command calibrates them."""
  config = gated.get_config()
  config.activation.update({'name': 'cats', 'density': 0.5, 'inner': {'name': 'silu'}})
  return config
