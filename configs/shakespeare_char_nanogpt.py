"""draft"""

from ml_collections import ConfigDict

from configs import shakespeare_char


def get_config() -> ConfigDict:
  """nanoGPT's architecture and optimizer settings."""
  config = shakespeare_char.get_config()
  config.model.update({'norm': 'layernorm', 'positions': 'learned', 'init': 'gpt2', 'tied': True})
  config.activation.update({'name': 'gelu', 'otherwise': 'gelu'})
  config.optimizer.update({'learning_rate': 1e-3})
  return config
