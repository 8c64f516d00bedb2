"""Qwen3, dense."""

from ml_collections import ConfigDict

from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import ATTENTION, LlamaLike, full_attention
from sparse_lm.convert.methods import Overrides
from sparse_lm.core.records import JsonObject
from sparse_lm.layers.spec import OF_HEAD


class Qwen3(LlamaLike):
  """Qwen3 (Yang et al. 2025): Llama with RMSNorm of each head's queries and keys."""

  architecture = 'Qwen3ForCausalLM'
  gguf_permutes = False
  default_head_width = 128

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    full_attention(fields)
    biases = tuple(ATTENTION) if fields.take('attention_bias', bool, False) else ()
    return super().read(fields) | {'model.biases': biases, 'model.query_key_norm': OF_HEAD}

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    own = {'use_sliding_window': False, 'attention_bias': bool(config.model.biases)}
    return super().written(config) | own
