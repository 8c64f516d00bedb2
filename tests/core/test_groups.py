"""Units that span matrices: pooling, expansion and selection, against loops over weights."""

import jax
import numpy as np
import pytest

from sparse_lm.core import groups
from sparse_lm.core.groups import Group, Member
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.patterns import pattern

# An MLP of 4 units whose matrices have units of one and two columns or rows, and 2 experts of 3.
PLAIN = Group('neuron', 'mlp', 4, (Member('up', -1), Member('down', -2), Member('absent', -1)))
WIDE = Group('head', 'attention', 4, (Member('query', -1), Member('key', -1), Member('out', -2)))
EXPERTS = Group('neuron', 'experts', 6, (Member('in', -1), Member('back', -2)))
LAYERS = Group(
  'layer', '', 2, (Member('up', None, 1), Member('down', None, 0), Member('b', None, 1))
)
SHAPES = {
  'up': (5, 4), 'down': (4, 3), 'query': (5, 8), 'key': (5, 4), 'out': (8, 5),
  'in': (2, 5, 3), 'back': (2, 3, 5), 'b': (7,), 'other': (3, 3),
}  # fmt: skip


def weights_of(group, unit):
  """`(leaf, index)` of every weight of a unit, by loops over the leaves."""
  for member in group.members:
    if member.path not in SHAPES:
      continue
    shape = SHAPES[member.path]
    for index in np.ndindex(shape):
      if member.axis is None:
        owner = member.unit
      else:
        expert = index[0] if len(shape) == 3 else 0
        experts = shape[0] if len(shape) == 3 else 1
        per_unit = experts * shape[member.axis] // group.units
        owner = (expert * shape[member.axis] + index[member.axis]) // per_unit
      if owner == unit:
        yield member.path, index


@pytest.mark.parametrize('group', [PLAIN, WIDE, EXPERTS, LAYERS], ids=['plain', 'wide', 'e', 'l'])
def test_pool_and_expand_equal_loops_over_weights(group):
  draw = np.random.default_rng(0)
  leaves = {path: draw.normal(size=shape).astype('f') for path, shape in SHAPES.items()}
  values = draw.normal(size=group.units).astype('f')
  pooled, spread = groups.pool(group, leaves), groups.expand(group, values, SHAPES)
  assert set(spread) == {m.path for m in group.members} & set(SHAPES)
  seen = {path: np.zeros(array.shape, int) for path, array in spread.items()}
  assert {path: array.shape for path, array in spread.items()} == {p: SHAPES[p] for p in spread}
  for unit in range(group.units):
    own = list(weights_of(group, unit))
    assert float(pooled[unit]) == pytest.approx(
      np.mean([leaves[path][index] for path, index in own], dtype=np.float64), abs=1e-6
    )
    for path, index in own:
      assert spread[path][index] == values[unit]
      seen[path][index] += 1
  assert all((count == 1).all() for count in seen.values())  # no weight has two units, or none


def model_of(tiny_config, **fields):
  return lm.from_config(tiny_config(**{'model__layers': 2, **fields}), vocab=11)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_the_model_declares_its_neurons_heads_and_layers(remat, tiny_config):
  found = plan_of(
    model_of(tiny_config, model__heads=4, model__kv_heads=2, model__remat=remat, model__bias=True)
  ).units
  assert [group.name for group in found if group.kind == 'layer'] == ['layer']
  units = {group.name: group.units for group in found}
  assert units == {
    'block_0/mlp/neuron': 32, 'block_0/attention/head': 2,
    'block_1/mlp/neuron': 32, 'block_1/attention/head': 2, 'layer': 2,
  }  # fmt: skip
  (layer,) = (group for group in found if group.kind == 'layer')
  paths = set(plan_of(model_of(tiny_config, model__bias=True)).shapes)
  assert {m.path for m in layer.members} == {path for path in paths if path.startswith('block_')}
  assert {m.path.partition('/')[0]: m.unit for m in layer.members} == {'block_0': 0, 'block_1': 1}


# Grouped patterns on the groups that the real model declares.

WIDTH, HIDDEN, HEADS, KEY_HEADS, EXPERTS = 16, 12, 4, 2, 3
HEAD = WIDTH // HEADS
MLPS = {
  'dense': {},
  'gated': {},
  'predictor_topk': {},
  'moe_topk': {'mlp__experts': EXPERTS},
}


def best_half(values):
  mask = np.zeros(values.size, bool)
  mask[np.argsort(-values, kind='stable')[: values.size // 2]] = True
  return mask


def neurons_by_loop(mlp):
  """The weights of every neuron as (leaf, index) pairs, in the order of the units."""
  if mlp == 'moe_topk':
    return [
      [('mlp/experts/up', np.s_[e, :, j]), ('mlp/experts/down', np.s_[e, j, :])]
      for e in range(EXPERTS)
      for j in range(HIDDEN)
    ]
  into = {'dense': ['up'], 'gated': ['gate', 'up'], 'predictor_topk': ['predictor', 'up']}[mlp]
  return [
    [(f'mlp/{name}/kernel', np.s_[:, j]) for name in into] + [('mlp/down/kernel', np.s_[j, :])]
    for j in range(HIDDEN)
  ]


def heads_by_loop():
  """Query heads go with the key head that they read."""
  shared = HEADS // KEY_HEADS * HEAD
  units = []
  for g in range(KEY_HEADS):
    queries, keys = slice(g * shared, (g + 1) * shared), slice(g * HEAD, (g + 1) * HEAD)
    projections = [('query', queries), ('key', keys), ('value', keys)]
    unit = [(f'attention/{name}/kernel', np.s_[:, part]) for name, part in projections]
    units.append([*unit, ('attention/out/kernel', np.s_[queries, :])])
  return units


def in_layer(layer, units):
  return [[(f'block_{layer}/{leaf}', index) for leaf, index in unit] for unit in units]


@pytest.mark.parametrize(('kind', 'mlp'), [
  *(('neuron', mlp) for mlp in MLPS), ('head', 'dense'), ('layer', 'gated'),
])  # fmt: skip
def test_units_of_the_model_are_kept_whole_by_the_mean_over_their_weights(kind, mlp, tiny_config):
  sizes = {'model__layers': 2, 'model__hidden': HIDDEN, 'model__heads': HEADS}
  config = tiny_config(**sizes, model__kv_heads=KEY_HEADS, mlp__name=mlp, **MLPS[mlp])
  model = lm.from_config(config, vocab=11)
  units = pattern(kind, plan_of(model).units)
  draw = np.random.default_rng(3)
  kernels = {
    path: np.abs(draw.normal(size=leaf.shape)).astype('f')
    for path, leaf in plan_of(model).shapes.items()
    if leaf.ndim >= 2 and path.startswith('block_') and 'router' not in path
  }
  scores = {path: score for path, score in kernels.items() if units.covers(path, score.shape)}
  if kind == 'layer':
    pools = [[[(p, ...) for p in kernels if p.startswith(f'block_{i}/')] for i in range(2)]]
  else:
    loop = neurons_by_loop(mlp) if kind == 'neuron' else heads_by_loop()
    pools = [in_layer(layer, loop) for layer in range(2)]
  members = {leaf for pool in pools for unit in pool for leaf, _ in unit}
  assert set(scores) == members  # what has no units of the pattern stays dense

  target = dict.fromkeys(scores, np.float32(0.5))
  got = jax.device_get(jax.jit(units.masks)(scores, target))
  for pool in pools:
    means = [
      np.concatenate([scores[leaf][index].ravel() for leaf, index in unit]).mean(dtype=np.float64)
      for unit in pool
    ]
    for unit, stays in zip(pool, best_half(np.array(means))):
      assert {bool(np.all(got[leaf][index])) for leaf, index in unit} == {bool(stays)}
      assert {bool(np.any(got[leaf][index])) for leaf, index in unit} == {bool(stays)}
