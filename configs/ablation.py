"""draft"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """A model small enough for dozens of runs in minutes on a laptop."""
  config = base.get_config()
  config.data.update({'context': 64, 'batch': 16})
  config.model.update({'layers': 2, 'width': 64, 'hidden': 256, 'heads': 2, 'kv_heads': 2})
  config.optimizer.update({'learning_rate': 1e-2})
  config.train.update({'steps': 300, 'log_every': 50, 'eval_every': 300, 'checkpoint_every': 300})
  return config
