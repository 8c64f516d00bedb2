"""OLMoE, a mixture of experts."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from sparse_lm.convert.family import Tensors, stacked, transposed
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import MLP, LlamaLike, several
from sparse_lm.convert.methods import MIXTURE, Overrides
from sparse_lm.core.records import JsonObject
from sparse_lm.layers.spec import OF_ALL


class Olmoe(LlamaLike):
  """OLMoE (Muennighoff et al. 2024): gated experts, RMSNorm over all heads of queries and of keys."""

  architecture = 'OlmoeForCausalLM'
  mlps = (MIXTURE,)
  default_epsilon = 1e-5

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    fields.only('clip_qkv', None, None)
    fields.only('attention_bias', False, False)
    normalise = fields.take('norm_topk_prob', bool, False)
    k = fields.take('num_experts_per_tok', int, 8)
    return super().read(fields) | {
      'model.query_key_norm': OF_ALL,
      'mlp.name': MIXTURE,
      'mlp.gated': True,
      'mlp.experts': fields.take('num_experts', int, 64),
      'mlp.k': several(fields, k) if normalise else k,
      'mlp.normalise': normalise,
    }

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    mlp = config.mlp
    return super().written(config) | {
      'num_experts': mlp.experts,
      'num_experts_per_tok': mlp.k,
      'norm_topk_prob': mlp.normalise,
    }

  def mlp(self, config: ConfigDict, there: str, here: str) -> Iterator[Tensors]:
    """Yields the tensors of a layer's router and experts."""
    yield transposed(f'{there}.mlp.gate.weight', f'{here}/router/kernel')
    for ours, theirs in MLP.items():
      each = [f'{there}.mlp.experts.{i}.{theirs}.weight' for i in range(config.mlp.experts)]
      yield stacked(each, f'{here}/experts/{ours}')
