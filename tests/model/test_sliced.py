"""A masked model computes what a physically smaller one does (METHODS.md 3.2 and 3.3)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core import tree
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.patterns import pattern
from sparse_lm.weights.method import apply_masks


def model_of(tiny_config, **fields):
  return lm.from_config(tiny_config(**{'model__layers': 2, **fields}), vocab=11)


def random_params(model, seed=0):
  """Every parameter at random, biases and the head too."""
  draw = np.random.default_rng(seed).normal
  return jax.tree.map(lambda a: draw(0, 0.4, a.shape).astype('f'), plan_of(model).params)


@functools.cache
def applied(model):
  return jax.jit(lambda params, others, tokens: model.apply({'params': params, **others}, tokens))


TOKENS = np.random.default_rng(5).integers(0, 11, (2, 16)).astype(np.int32)


def logits_of(model, params, others=None):
  return np.asarray(applied(model)(params, others or {}, TOKENS))


def added_by(model, layer, block, x):
  """What a layer adds to the residual stream."""
  module = lm.Layer(model.spec, model.slots, layer, model.site)
  return jax.jit(module.apply)({'params': {f'block_{layer}': block}}, x) - x


def masked(model, params, kind, keep, matrices_only=True):
  """Parameters with zeros outside of the units `keep`, bool by group; other leaves stay dense."""
  units = pattern(kind, plan_of(model).units)
  covered = tree.map_named(
    lambda path, w: (
      w if units.covers(path, w.shape) and (w.ndim >= 2 or not matrices_only) else None
    ),
    params,
  )
  return apply_masks(params, units.expand(keep, covered))


def flat_units(kept, total):
  keep = np.zeros(total, bool)
  keep[kept] = True
  return keep


def agree(found, wanted, dense):
  assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  assert np.abs(wanted - dense).max() > 1e-2  # the units matter


@pytest.mark.parametrize('fields', [
  {}, {'model__bias': True}, {'mlp__name': 'gated', 'activation__name': 'silu'},
  {'mlp__name': 'predictor_topk', 'mlp__density': 1.0}, {'model__bias': True, 'mlp__name': 'gated'},
], ids=lambda fields: '-'.join(map(str, fields.values())) or 'default')  # fmt: skip
def test_masked_neurons_equal_a_narrower_mlp(fields, tiny_config):
  model, small = (model_of(tiny_config, model__hidden=h, **fields) for h in (12, 5))
  params = random_params(model)
  draw = np.random.default_rng(1)
  kept = {f'block_{i}': np.sort(draw.permutation(12)[:5]) for i in range(2)}
  keep = {f'{block}/mlp/neuron': flat_units(units, 12) for block, units in kept.items()}
  sliced = jax.tree.map(np.copy, params)
  for block, units in kept.items():
    mlp = sliced[block]['mlp']
    mlp['down']['kernel'] = mlp['down']['kernel'][units]
    for name in set(mlp) - {'down'}:
      mlp[name] = {leaf: array[..., units] for leaf, array in mlp[name].items()}
  dense = logits_of(model, params)
  agree(logits_of(model, masked(model, params, 'neuron', keep)), logits_of(small, sliced), dense)


@pytest.mark.parametrize('name', ['moe_topk', 'expert_choice'])
def test_masked_neurons_of_experts_equal_narrower_experts(name, tiny_config):
  own = {'mlp__name': name, 'mlp__experts': 3, 'model__bias': True}
  model, small = (model_of(tiny_config, **own, mlp__hidden=hidden) for hidden in (8, 3))
  params = random_params(model)
  # Half of the tokens or so exceed the thresholds of experts that take what does.
  thresholds = plan_of(model).variables.get('router', {})
  others = {'router': jax.tree.map(lambda a: np.full(a.shape, 1 / 3, 'f'), thresholds)}
  draw = np.random.default_rng(2)
  keep, sliced = {}, jax.tree.map(np.copy, params)
  for block in ('block_0', 'block_1'):
    kept = np.stack([np.sort(draw.permutation(8)[:3]) for _ in range(3)])  # of each expert
    keep[f'{block}/mlp/experts/neuron'] = flat_units((kept + 8 * np.arange(3)[:, None]).ravel(), 24)
    experts, each = sliced[block]['mlp']['experts'], np.arange(3)[:, None]
    experts['up'] = experts['up'].transpose(0, 2, 1)[each, kept].transpose(0, 2, 1)
    experts['up_bias'] = experts['up_bias'][each, kept]
    experts['down'] = experts['down'][each, kept]
  dense = logits_of(model, params, others)
  found = logits_of(model, masked(model, params, 'neuron', keep), others)
  agree(found, logits_of(small, sliced, others), dense)


def test_masked_layers_equal_a_shallower_model(tiny_config):
  model, small = (model_of(tiny_config, model__layers=layers) for layers in (3, 2))
  params = random_params(model)
  keep = {'layer': np.array([True, False, True])}
  sliced = {'block_0': params['block_0'], 'block_1': params['block_2']}
  sliced |= {name: params[name] for name in ('embed', 'norm')}
  dense = logits_of(model, params)
  agree(logits_of(model, masked(model, params, 'layer', keep)), logits_of(small, sliced), dense)


def test_a_dropped_layer_adds_nothing_once_its_biases_go_too(tiny_config):
  model, small = (
    model_of(tiny_config, model__layers=layers, model__bias=True) for layers in (3, 2)
  )
  params = random_params(model)
  keep = {'layer': np.array([True, False, True])}
  sliced = {'block_0': params['block_0'], 'block_1': params['block_2']}
  sliced |= {name: params[name] for name in ('embed', 'norm')}
  wanted, dense = logits_of(small, sliced), logits_of(model, params)
  agree(logits_of(model, masked(model, params, 'layer', keep, False)), wanted, dense)
  # Biases that stay dense, as `config.weight.dense` has them, are what the layer still adds.
  left = masked(model, params, 'layer', keep)
  assert np.abs(logits_of(model, left) - wanted).max() > 1e-2
  x = np.random.default_rng(4).normal(size=(2, 16, 16)).astype('f')
  added = added_by(model, 1, left['block_1'], x)
  own = params['block_1']
  constant = own['attention']['out']['bias'] + own['mlp']['down']['bias']
  assert_allclose(added, np.broadcast_to(constant, x.shape), atol=1e-5)


def attention_by_numpy(own, x, heads, key_heads, width):
  """Causal attention without rotary positions over the given heads, float64 `[B, L, D]`."""
  b, l, _ = x.shape
  shape = {'query': heads, 'key': key_heads, 'value': key_heads}
  q, k, v = (
    (x @ own[name]['kernel'] + own[name]['bias']).reshape(b, l, count, width)
    for name, count in shape.items()
  )
  out = np.zeros((b, l, heads, width))
  for h in range(heads):
    g = h // (heads // key_heads)
    scores = q[:, :, h] @ k[:, :, g].transpose(0, 2, 1) / np.sqrt(width)
    scores = np.where(np.tri(l, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, :, h] = weights / weights.sum(-1, keepdims=True) @ v[:, :, g]
  return out.reshape(b, l, -1) @ own['out']['kernel'] + own['out']['bias']


@pytest.mark.parametrize(('key_heads', 'kept'), [(4, [0, 2, 3]), (4, [1]), (2, [1]), (2, [0])])
def test_masked_heads_equal_attention_over_the_others(key_heads, kept, tiny_config):
  heads = 4
  model = model_of(
    tiny_config,
    model__layers=1,
    model__heads=heads,
    model__kv_heads=key_heads,
    model__positions='learned',
    model__bias=True,
  )
  params = random_params(model)
  keep = {'block_0/attention/head': flat_units(kept, key_heads)}
  block = masked(model, params, 'head', keep)['block_0']
  # A silent MLP leaves what attention adds.
  block['mlp'] = jax.tree.map(jnp.zeros_like, block['mlp'])
  x = np.random.default_rng(6).normal(size=(2, 16, 16)).astype('f')
  added = added_by(model, 0, block, x)

  per, width = heads // key_heads, model.spec.head_dim
  columns = np.arange(16).reshape(heads, width)
  keys = columns[:key_heads][kept].ravel()
  queries = columns.reshape(key_heads, per * width)[kept].ravel()
  own = jax.tree.map(np.float64, params['block_0']['attention'])
  sliced = {
    name: {leaf: array[..., part] for leaf, array in own[name].items()}
    for name, part in (('query', queries), ('key', keys), ('value', keys))
  }
  sliced['out'] = {'kernel': own['out']['kernel'][queries], 'bias': own['out']['bias']}
  scale = params['block_0']['norm_1']['scale'].astype(np.float64)
  normed = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
  wanted = attention_by_numpy(sliced, normed, per * len(kept), len(kept), width)
  everything = attention_by_numpy(own, normed, heads, key_heads, width)
  agree(added, wanted, everything)


def test_masked_rotary_heads_do_not_read_what_was_dropped(tiny_config):
  # Rotary positions turn zeros into zeros: whatever stood in a dropped head reaches no logit.
  model = model_of(tiny_config, model__layers=1, model__heads=4, model__kv_heads=2)
  first, second = random_params(model, 0), random_params(model, 1)
  keep = {'block_0/attention/head': np.array([True, False])}
  mixed = jax.tree.map(np.copy, first)
  kept_leaves = masked(model, jax.tree.map(np.ones_like, first), 'head', keep)
  for name in ('query', 'key', 'value', 'out'):
    alive = kept_leaves['block_0']['attention'][name]['kernel']
    own, other = (p['block_0']['attention'][name]['kernel'] for p in (first, second))
    mixed['block_0']['attention'][name]['kernel'] = np.where(alive, own, other)
  assert np.abs(logits_of(model, mixed) - logits_of(model, first)).max() > 1e-2
  runs = [logits_of(model, masked(model, params, 'head', keep)) for params in (first, mixed)]
  assert_array_equal(*runs)
