"""GPT-NeoX and Pythia."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from sparse_lm.convert.family import Family, Tensors, by_head, same, transposed
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.llama_like import rotary, written_rotary
from sparse_lm.convert.methods import PLAIN_MLP, Overrides, activation, foreign_activation
from sparse_lm.core.records import JsonObject
from sparse_lm.layers.spec import LAYERNORM
from sparse_lm.runs import configs

_PROJECTED = ('query', 'key', 'value')
_ATTENTION = (*_PROJECTED, 'out')
_OTHERS = ('up', 'down', 'norm')


class GPTNeoX(Family):
  """GPT-NeoX (Black et al. 2022): parallel residual, rotation of a part of each head, LayerNorm."""

  architecture = 'GPTNeoXForCausalLM'
  prefix = 'gpt_neox.'
  heads = ('embed_out.weight',)
  mlps = (PLAIN_MLP,)
  buffers = (r'rotary_emb\.inv_freq$', r'\.attention\.(masked_)?bias$')

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    heads = fields.take('num_attention_heads', int, 64)
    attention = _ATTENTION if fields.take('attention_bias', bool, True) else ()
    return {
      'data.vocab_size': fields.take('vocab_size', int),
      'data.context': fields.take('max_position_embeddings', int, 2048),
      'model.layers': fields.take('num_hidden_layers', int, 44),
      'model.width': fields.take('hidden_size', int, 6144),
      'model.hidden': fields.take('intermediate_size', int, 24576),
      'model.heads': heads,
      'model.kv_heads': heads,
      'model.norm': LAYERNORM,
      'model.norm_epsilon': fields.take('layer_norm_eps', float, 1e-5),
      'model.biases': (*attention, *_OTHERS),
      'model.parallel_residual': fields.take('use_parallel_residual', bool, True),
      'model.tied': fields.take('tie_word_embeddings', bool, False),
      'mlp.name': PLAIN_MLP,
      **activation(f'{fields.where}: hidden_act', fields.take('hidden_act', str, 'gelu')),
      **self._rotary(fields),
    }

  def _rotary(self, fields: Fields) -> Overrides:
    """Returns the fields of rotary positions, which have other names in older files."""
    fraction = fields.take('rotary_pct', float, 0.25)
    base = fields.take('rotary_emb_base', float, 10_000.0)
    older = {'partial_rotary_factor': fraction, 'rope_theta': base}
    named = Fields(older | fields.values, fields.where)
    fields.skip(*older, 'rope_parameters', 'rope_scaling')
    return rotary(named, 10_000.0, fraction=True)

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    model, rope = config.model, written_rotary(config)
    return {
      'vocab_size': config.data.vocab_size,
      'max_position_embeddings': config.data.context,
      'num_hidden_layers': model.layers,
      'hidden_size': model.width,
      'intermediate_size': model.hidden,
      'num_attention_heads': model.heads,
      'layer_norm_eps': model.norm_epsilon,
      'attention_bias': 'query' in model.biases,
      'use_parallel_residual': model.parallel_residual,
      'tie_word_embeddings': model.tied,
      'hidden_act': foreign_activation(configs.flat(config)),
      'rotary_pct': model.rope_fraction,
      'rotary_emb_base': rope.pop('rope_theta'),
      **rope,
    }

  def tensors(self, config: ConfigDict) -> Iterator[Tensors]:
    """Yields all tensors."""
    model = config.model
    yield same('embed_in.weight', 'embed/tokens')
    yield from _norm('final_layer_norm', 'norm')
    if not model.tied:
      yield transposed('embed_out.weight', 'embed/head/kernel')
    parts = [('weight', 'kernel'), ('bias', 'bias')]
    for layer in range(model.layers):
      there, here = f'layers.{layer}', f'block_{layer}'
      yield from _norm(f'{there}.input_layernorm', f'{here}/norm_1')
      yield from _norm(f'{there}.post_attention_layernorm', f'{here}/norm_2')
      for theirs, ours in parts if 'query' in model.biases else parts[:1]:
        fused = [f'{here}/attention/{name}/{ours}' for name in _PROJECTED]
        yield by_head(f'{there}.attention.query_key_value.{theirs}', fused, model.heads)
        yield transposed(f'{there}.attention.dense.{theirs}', f'{here}/attention/out/{ours}')
      for theirs, ours in parts:
        yield transposed(f'{there}.mlp.dense_h_to_4h.{theirs}', f'{here}/mlp/up/{ours}')
        yield transposed(f'{there}.mlp.dense_4h_to_h.{theirs}', f'{here}/mlp/down/{ours}')


def _norm(theirs: str, ours: str) -> Iterator[Tensors]:
  yield same(f'{theirs}.weight', f'{ours}/scale')
  yield same(f'{theirs}.bias', f'{ours}/bias')
