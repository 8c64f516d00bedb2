"""Mixtral, a mixture of experts."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from sparse_lm.convert.family import Tensors, stacked, transposed
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import LlamaLike, several
from sparse_lm.convert.methods import MIXTURE, Overrides
from sparse_lm.core.records import JsonObject

_EXPERT = {'gate': 'w1', 'up': 'w3', 'down': 'w2'}


class Mixtral(LlamaLike):
  """Mixtral (Jiang et al. 2024): gated experts; the weights of a token's experts sum to 1."""

  architecture = 'MixtralForCausalLM'
  mlps = (MIXTURE,)
  default_epsilon = 1e-5
  default_base = 1e6
  default_kv_heads = 8

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    fields.only('sliding_window', None, None)
    return super().read(fields) | {
      'mlp.name': MIXTURE,
      'mlp.gated': True,
      'mlp.experts': fields.take('num_local_experts', int, 8),
      'mlp.k': several(fields, fields.take('num_experts_per_tok', int, 2)),
      'mlp.normalise': True,
    }

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    own = {
      'num_local_experts': config.mlp.experts,
      'num_experts_per_tok': config.mlp.k,
    }
    return super().written(config) | own | {'sliding_window': None}

  def mlp(self, config: ConfigDict, there: str, here: str) -> Iterator[Tensors]:
    """Yields the tensors of a layer's router and experts."""
    there = f'{there}.block_sparse_moe'
    yield transposed(f'{there}.gate.weight', f'{here}/router/kernel')
    for ours, theirs in _EXPERT.items():
      each = [f'{there}.experts.{i}.{theirs}.weight' for i in range(config.mlp.experts)]
      yield stacked(each, f'{here}/experts/{ours}')
