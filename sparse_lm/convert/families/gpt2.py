"""GPT-2."""

from collections.abc import Iterator

from ml_collections import ConfigDict

from sparse_lm.convert.family import Family, Tensors, columns, same, transposed
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.methods import PLAIN_MLP, Overrides, activation, foreign_activation
from sparse_lm.core.records import JsonObject
from sparse_lm.layers.spec import LAYERNORM, LEARNED
from sparse_lm.runs import configs

_PROJECTED = ('query', 'key', 'value')


class GPT2(Family):
  """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, weights as `[in, out]`."""

  architecture = 'GPT2LMHeadModel'
  prefix = 'transformer.'
  mlps = (PLAIN_MLP,)
  buffers = (r'\.attn\.(masked_)?bias$',)

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config."""
    width, heads = fields.take('n_embd', int, 768), fields.take('n_head', int, 12)
    context = fields.take('n_positions', int, 1024)
    fields.only('n_ctx', context, context)
    fields.only('scale_attn_weights', True, True)
    fields.skip('reorder_and_upcast_attn')  # changes only the rounding
    return {
      'data.vocab_size': fields.take('vocab_size', int, 50257),
      'data.context': context,
      'model.layers': fields.take('n_layer', int, 12),
      'model.width': width,
      'model.hidden': fields.take('n_inner', int, 4 * width),
      'model.heads': heads,
      'model.kv_heads': heads,
      'model.norm': LAYERNORM,
      'model.norm_epsilon': fields.take('layer_norm_epsilon', float, 1e-5),
      'model.positions': LEARNED,
      'model.bias': True,
      'model.tied': fields.take('tie_word_embeddings', bool, True),
      'mlp.name': PLAIN_MLP,
      **activation(
        f'{fields.where}: activation_function', fields.take('activation_function', str, 'gelu_new')
      ),
    }

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config."""
    model = config.model
    return {
      'vocab_size': config.data.vocab_size,
      'n_positions': config.data.context,
      'n_layer': model.layers,
      'n_embd': model.width,
      'n_inner': model.hidden,
      'n_head': model.heads,
      'layer_norm_epsilon': model.norm_epsilon,
      'activation_function': foreign_activation(configs.flat(config)),
      'tie_word_embeddings': model.tied,
    }

  def tensors(self, config: ConfigDict) -> Iterator[Tensors]:
    """Yields all tensors."""
    yield same('wte.weight', 'embed/tokens')
    yield same('wpe.weight', 'embed/positions')
    if not config.model.tied:
      yield transposed('lm_head.weight', 'embed/head/kernel')
    yield from _norm('ln_f', 'norm')
    for layer in range(config.model.layers):
      there, here = f'h.{layer}', f'block_{layer}'
      yield from _norm(f'{there}.ln_1', f'{here}/norm_1')
      yield from _norm(f'{there}.ln_2', f'{here}/norm_2')
      for theirs, ours in (('weight', 'kernel'), ('bias', 'bias')):
        fused = [f'{here}/attention/{name}/{ours}' for name in _PROJECTED]
        yield columns(f'{there}.attn.c_attn.{theirs}', fused)
        yield same(f'{there}.attn.c_proj.{theirs}', f'{here}/attention/out/{ours}')
        yield same(f'{there}.mlp.c_fc.{theirs}', f'{here}/mlp/up/{ours}')
        yield same(f'{there}.mlp.c_proj.{theirs}', f'{here}/mlp/down/{ours}')


def _norm(theirs: str, ours: str) -> Iterator[Tensors]:
  yield same(f'{theirs}.weight', f'{ours}/scale')
  yield same(f'{theirs}.bias', f'{ours}/bias')
