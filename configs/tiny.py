"""Smoke."""

from configs import base


def get_config():
  config = base.get_config()
  config.data.update({'context': 64, 'batch': 16})
  config.model.update({'layers': 2, 'width': 128, 'hidden': 512})
  config.train.update({'steps': 200, 'eval_every': 100, 'checkpoint_every': 100})
  return config
