"""draft"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """This project's default architecture at nanoGPT's CPU size."""
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
  config.optimizer.update({'learning_rate': 3e-3})
  config.train.update({'steps': 2000, 'log_every': 50, 'eval_every': 500, 'checkpoint_every': 1000})
  return config
