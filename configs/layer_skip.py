"""Layer dropout and exits that predict, on four layers: trained for self-speculative decoding.

Command:  python -m sparse_lm.train --config=configs/layer_skip.py --workdir=results/layer_skip
Time:     57 s on one CPU core, compilation included.
Expected: validation loss 1.816 nats per byte (a plain stack of these layers: 1.793), for
          1.095 times its training FLOPs. Of 4 drafts a round from the first two layers,
          57 % are accepted behind 'def ' (a plain stack's: 25 %):
          python -m sparse_lm.generate --workdir=results/layer_skip --prompt='def ' --tokens=50
          --temperature=0 --speculate=4
Paper:    LayerSkip (Elhoushi et al. 2024).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Four layers of width 96; the head predicts after two of them in turn, and after the last one."""
  config = tiny.get_config()
  config.model.update({'layers': 4, 'width': 96, 'hidden': 384})
  config.stack.update({'name': 'layer_skip'})
  return config
