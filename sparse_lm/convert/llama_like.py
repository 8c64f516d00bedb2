"""The base class of Llama and similar families: RMSNorm, rotary positions, gated MLPs."""

from collections.abc import Iterator
from typing import ClassVar

from ml_collections import ConfigDict

from sparse_lm.convert.family import Family, Tensors, same, transposed
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.methods import GATED_MLP, Overrides, activation, foreign_activation
from sparse_lm.core.errors import UserError, listed, require
from sparse_lm.core.records import JsonObject
from sparse_lm.layers.spec import LINEAR, LLAMA3, NO_NORM
from sparse_lm.runs import configs

ATTENTION = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'o_proj'}
MLP = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
# For each scaling: fields of `config.model`, by the field of `rope_parameters` or `rope_scaling`.
_ROPE = {
  LINEAR: {'factor': 'rope_factor'},
  LLAMA3: {
    'factor': 'rope_factor',
    'low_freq_factor': 'rope_low',
    'high_freq_factor': 'rope_high',
    'original_max_position_embeddings': 'rope_context',
  },
}


class LlamaLike(Family):
  """The base class of families whose fields and tensors have the same names as those of Llama."""

  prefix = 'model.'
  # Values of fields that a config may leave out, as transformers has them.
  default_head_width: ClassVar[int] = 0  # 0 = width / heads
  default_kv_heads: ClassVar[int] = 0  # 0 = as many as query heads
  default_epsilon: ClassVar[float] = 1e-6
  default_base: ClassVar[float] = 10_000.0

  def read(self, fields: Fields) -> Overrides:
    """Returns the fields that all of these families share."""
    heads, width = fields.take('num_attention_heads', int), fields.take('hidden_size', int)
    usual = width // max(heads, 1)
    head_width = fields.take('head_dim', int, self.default_head_width or usual)
    fields.only('mlp_bias', False, False)
    return {
      'data.vocab_size': fields.take('vocab_size', int),
      'data.context': fields.take('max_position_embeddings', int),
      'model.layers': fields.take('num_hidden_layers', int),
      'model.width': width,
      'model.hidden': fields.take('intermediate_size', int),
      'model.heads': heads,
      'model.kv_heads': fields.take('num_key_value_heads', int, self.default_kv_heads or heads),
      'model.head_width': 0 if head_width * heads == width else head_width,
      'model.norm_epsilon': fields.take('rms_norm_eps', float, self.default_epsilon),
      'model.tied': fields.take('tie_word_embeddings', bool, False),
      'mlp.name': GATED_MLP,
      **activation(f'{fields.where}: hidden_act', fields.take('hidden_act', str, 'silu')),
      **rotary(fields, self.default_base),
    }

  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the fields that all of these families share."""
    model = config.model
    return {
      'vocab_size': config.data.vocab_size,
      'max_position_embeddings': config.data.context,
      'num_hidden_layers': model.layers,
      'hidden_size': model.width,
      'intermediate_size': model.hidden,
      'num_attention_heads': model.heads,
      'num_key_value_heads': model.kv_heads,
      'head_dim': model.head_width or model.width // model.heads,
      'rms_norm_eps': model.norm_epsilon,
      'tie_word_embeddings': model.tied,
      'hidden_act': foreign_activation(configs.flat(config)),
      'attention_bias': False,
      **written_rotary(config),
    }

  def tensors(self, config: ConfigDict) -> Iterator[Tensors]:
    """Yields the tensors of all layers, and the tensors outside the layers."""
    yield same('embed_tokens.weight', 'embed/tokens')
    yield same('norm.weight', 'norm/scale')
    if not config.model.tied:
      yield transposed('lm_head.weight', 'embed/head/kernel')
    for layer in range(config.model.layers):
      there, here = f'layers.{layer}', f'block_{layer}'
      yield same(f'{there}.input_layernorm.weight', f'{here}/norm_1/scale')
      yield same(f'{there}.post_attention_layernorm.weight', f'{here}/norm_2/scale')
      yield from _linear(config, f'{there}.self_attn', f'{here}/attention', ATTENTION)
      if config.model.query_key_norm != NO_NORM:
        yield same(f'{there}.self_attn.q_norm.weight', f'{here}/attention/query_norm/scale')
        yield same(f'{there}.self_attn.k_norm.weight', f'{here}/attention/key_norm/scale')
      yield from self.mlp(config, there, f'{here}/mlp')

  def mlp(self, config: ConfigDict, there: str, here: str) -> Iterator[Tensors]:
    """Yields the tensors of an MLP: `there` is the foreign name of its layer, `here` its own path."""
    yield from _linear(config, f'{there}.mlp', here, MLP)


def _linear(
  config: ConfigDict, there: str, here: str, matrices: dict[str, str]
) -> Iterator[Tensors]:
  for ours, theirs in matrices.items():
    yield transposed(f'{there}.{theirs}.weight', f'{here}/{ours}/kernel')
    if config.model.bias or ours in config.model.biases:
      yield same(f'{there}.{theirs}.bias', f'{here}/{ours}/bias')


def several(fields: Fields, k: int) -> int:
  """Returns `k`, the experts of a token, if their weights can be normalised; raises UserError for 1."""
  valid = '2 or more, because this project does not normalise the weight of a single expert'
  require(k > 1, f'{fields.where}: num_experts_per_tok', k, valid)
  return k


def full_attention(fields: Fields) -> None:
  """Raises UserError if a layer's attention is limited to a sliding window."""
  fields.only('use_sliding_window', False, False)
  fields.skip('sliding_window', 'max_window_layers')  # no effect without a sliding window
  kinds = fields.take('layer_types', list, [])
  if wrong := [kind for kind in kinds if kind != 'full_attention']:
    raise UserError(
      f"{fields.where}: layer_types has {wrong[0]!r}; valid: 'full_attention' in every layer"
    )


def rotary(fields: Fields, base: float, fraction: bool = False) -> Overrides:
  """Returns the fields of rotary positions.

  Newer versions of transformers write `rope_parameters`; older ones write `rope_theta` and
  `rope_scaling`.

  Args:
    fields: the foreign config.
    base: the base if the config has none.
    fraction: whether the family rotates a part of each head (`partial_rotary_factor`).
  """
  name = 'rope_parameters' if fields.values.get('rope_parameters') else 'rope_scaling'
  fields.skip('rope_parameters', 'rope_scaling')
  rope = fields.inner(name)
  base = fields.take('rope_theta', float, base)
  found: Overrides = {'model.rope_base': rope.take('rope_theta', float, base)}
  if fraction:
    whole = fields.take('partial_rotary_factor', float, 1.0)
    found['model.rope_fraction'] = rope.take('partial_rotary_factor', float, whole)
  else:
    rope.only('partial_rotary_factor', 1.0, 1.0, 1)
  kind = rope.take('rope_type', str, rope.take('type', str, 'default'))
  if kind != 'default':
    if kind not in _ROPE:
      raise UserError(
        f'{rope.where}: rope_type={kind!r} is not supported; valid: default, {listed([*_ROPE])}'
      )
    found['model.rope_scaling'] = kind
    for theirs, ours in _ROPE[kind].items():
      is_count = theirs.endswith('embeddings')
      found[f'model.{ours}'] = rope.take(theirs, int if is_count else float)
  rope.finish()
  return found


def written_rotary(config: ConfigDict) -> JsonObject:
  """Returns the foreign fields of rotary positions."""
  model = config.model
  kind = model.rope_scaling
  fields = {theirs: model[ours] for theirs, ours in _ROPE.get(kind, {}).items()}
  scaling = {'rope_type': kind, **fields} if fields else None
  return {'rope_theta': model.rope_base, 'rope_scaling': scaling}
