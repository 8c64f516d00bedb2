"""LayerSkip on four layers: layer dropout and early exits, for self-speculative decoding.

Command:  python -m sparse_lm.train --config=configs/layer_skip.py --workdir=results/layer_skip
Time:     57 s on one CPU core, compilation included.
Expected: validation loss 1.816 nats per byte at 1.095 times the training FLOPs of a plain stack of
          these layers, which reaches 1.793. With 4 drafts a round from the first two layers, 57 % of
          the drafts after the prompt 'def ' are accepted (25 % for the plain stack):
          python -m sparse_lm.generate --workdir=results/layer_skip --prompt='def ' --tokens=50
          --temperature=0 --speculate=4
Paper:    LayerSkip (Elhoushi et al. 2024).
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
  """Four layers of width 96, with an exit loss at two earlier layers in turn and at the last layer."""
  config = tiny.get_config()
  config.model.update({'layers': 4, 'width': 96, 'hidden': 384})
  config.stack.update({'name': 'layer_skip'})
  return config
