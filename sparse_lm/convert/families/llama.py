"""Llama 1 to 3, and models with the same architecture, such as TinyLlama and SmolLM2."""

from ml_collections import ConfigDict

from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import ATTENTION, LlamaLike
from sparse_lm.convert.methods import Overrides
from sparse_lm.core.records import JsonObject


class Llama(LlamaLike):
  """Llama (Touvron et al. 2023): pre-norm, rotary positions, grouped queries, SwiGLU."""

  architecture = 'LlamaForCausalLM'
  gguf_permutes = True

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    biases = tuple(ATTENTION) if fields.take('attention_bias', bool, False) else ()
    fields.only('rope_interleaved', False, False)
    return super().read(fields) | {'model.biases': biases}

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    return super().written(config) | {'attention_bias': bool(config.model.biases)}
