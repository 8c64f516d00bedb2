"""nanoGPT's CPU setting with nanoGPT's architecture, the reference of configs/shakespeare_char.py.

Command:  python -m sparse_lm.train --config=configs/shakespeare_char_nanogpt.py --workdir=results/nano
          --config.data.path=<folder>/tiny_shakespeare.txt
Time:     1.6 minutes (38 ms a step) on 2 CPU cores.
Expected: validation loss 1.896 ± 0.006 nats per character over the whole split at the last step
          (mean ± sample standard deviation of three seeds). nanoGPT's README reports 1.88, the loss of
          its best checkpoint on 20 random batches.
Source:   github.com/karpathy/nanoGPT, config/train_shakespeare_char.py with its CPU overrides.
"""

from ml_collections import ConfigDict

from configs import shakespeare_char


def get_config() -> ConfigDict:
  """LayerNorm, learned positions, erf GELU, tied head, std-0.02 initialisation, rate 1e-3."""
  config = shakespeare_char.get_config()
  config.model.update({'norm': 'layernorm', 'positions': 'learned', 'init': 'gpt2', 'tied': True})
  config.activation.name = 'gelu'
  config.optimizer.update({'learning_rate': 1e-3})
  return config
