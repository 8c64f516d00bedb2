"""Qwen2 and Qwen2.5."""

from ml_collections import ConfigDict

from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import LlamaLike, full_attention
from sparse_lm.convert.methods import Overrides
from sparse_lm.core.records import JsonObject


class Qwen2(LlamaLike):
  """Qwen2 (Yang et al. 2024): Llama with biases of queries, keys and values."""

  architecture = 'Qwen2ForCausalLM'
  gguf_permutes = False

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    full_attention(fields)
    return super().read(fields) | {'model.biases': ('query', 'key', 'value')}

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    return super().written(config) | {'use_sliding_window': False}
