"""nanoGPT's CPU setting with this project's default architecture, on tiny Shakespeare.

Command:  python -m sparse_lm.train --config=configs/shakespeare_char.py --workdir=results/shakespeare
          --config.data.path=<folder>/tiny_shakespeare.txt
Time:     1.6 minutes (38 ms a step) on 2 CPU cores.
Expected: validation loss 1.675 ± 0.009 nats per character over the whole split at the last step (mean ±
          sample standard deviation of three seeds). nanoGPT's architecture reaches 1.896
          (configs/shakespeare_char_nanogpt.py).
Data:     the text of char-rnn (1,115,394 bytes, 65 characters), split 90/10 as in nanoGPT.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """4 layers, 4 heads, width 128, context 64, batch 12, 2000 steps, no dropout."""
  config = base.get_config()
  config.data.update(
    {
      'source': 'files',
      'path': 'data/tiny_shakespeare.txt',
      'split': (0.9, 0.1, 0.0),
      'tokenizer': 'chars',
      'context': 64,
      'batch': 12,
    }
  )
  config.model.update({'layers': 4, 'width': 128, 'hidden': 512, 'heads': 4, 'kv_heads': 4})
  config.optimizer.update({'learning_rate': 2e-3})
  config.train.update({'steps': 2000, 'log_every': 50, 'eval_every': 500, 'checkpoint_every': 1000})
  return config
