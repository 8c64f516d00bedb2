"""One-shot methods are calibrated only on the tokens that enter a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model.block import Block
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites
from sparse_lm.runs.build import build
from sparse_lm.train import one_shot
from sparse_lm.weights.one_shot import prune_by_obs

VOCAB, DENSITY = 23, 0.5
ROUTES = {
  'token_gate': {'depth__name': 'token_gate'},
  'hard concrete': {'depth__name': 'token_gate', 'depth__estimator': 'hard_concrete'},
  'mixture_of_depths': {'depth__name': 'mixture_of_depths', 'depth__capacity': 0.25},
}
ATTENTION = ('key', 'out', 'query', 'value')
PRUNED = (*(f'attention/{name}' for name in ATTENTION), 'mlp/down', 'mlp/up')


def random_variables(model, bias):
  """Of a model whose gates have that bias."""
  draw, shapes = np.random.default_rng(1), plan_of(model).variables
  variables = {
    name: tree.map_named(
      lambda path, a: np.asarray(
        np.full(a.shape, bias) if path.endswith('bias') else draw.normal(0, 0.4, a.shape), a.dtype
      ),
      shapes[name],
    )
    for name in shapes
    if name not in SOWN
  }
  return variables.pop('params'), variables


def entering(params, x_BxLxD, fields):
  """Which tokens enter the first layer in evaluation, by the gates' definitions."""
  x = np.float64(x_BxLxD)
  unit = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
  depth = params['depth_0']
  if fields['depth__name'] == 'mixture_of_depths':
    weight = unit @ depth['router']['kernel']
    read = np.concatenate([unit, weight], axis=-1)
    p = depth['router_predictor']
    return (read @ p['kernel'] + p['bias'])[..., 0] > 0
  logits = (unit @ depth['router']['kernel'] + depth['router']['bias'])[..., 0]
  return logits > (-np.log(11) if 'depth__estimator' in fields else 0)


def inputs_of_entering(model, params, x_BxLxD, enters_BxL):
  """What each kernel of the first block reads of sequences from which all other tokens are cut out."""

  def maker(slot):
    return lambda **own: slot.at(0, 1).make({'spec': model.spec, 'name': slot.slot} | own)

  made = {slot.slot: maker(slot) for slot in model.slots}
  supplied = {'spec': model.spec, 'name': 'mlp', 'activation': made['activation']}
  mlp = functools.partial(model.slots[2].at(0, 1).make, supplied)
  block = Block(model.spec, made['attention'], mlp)
  read = [f'{name}/input' for name in PRUNED]
  run = jax.jit(
    lambda tokens: sites.run(block, {'params': params['block_0']}, tokens, 'eval', read=read)
  )
  rows = {name: [] for name in PRUNED}
  for x_LxD, enters_L in zip(x_BxLxD, enters_BxL):
    if not enters_L.any():
      continue
    positions = np.flatnonzero(enters_L)[None]
    tokens = Tokens(x_LxD[enters_L][None], positions, np.ones_like(positions, bool))
    _, seen = run(tokens)
    for name in PRUNED:
      rows[name].append(seen[f'{name}/input'][0])
  return {name: np.concatenate(found) for name, found in rows.items()}


def routed(tiny_config, route, method, bias):
  """A program that prunes a model of one layer, the model's variables, and calibration text."""
  config = tiny_config(**ROUTES[route], weight__name=method, weight__sparsity=1 - DENSITY)
  program, target = build(config, VOCAB)
  tokens = np.random.default_rng(2).integers(0, VOCAB, (6, 16)).astype(np.int32)
  return program, target, *random_variables(program.model, bias), tokens


# Each route with one method; `make test-slow` runs all pairs.
@pytest.mark.parametrize(
  ('route', 'method'),
  [
    (route, method)
    if (method == 'wanda') == (route == 'token_gate')
    else pytest.param(route, method, marks=pytest.mark.slow)
    for route in ROUTES
    for method in ('wanda', 'sparsegpt')
  ],
)
def test_masks_are_those_of_the_entering_tokens_alone(route, method, tiny_config):
  bias = -2.5 if route == 'hard concrete' else -0.8
  program, target, params, state, tokens = routed(tiny_config, route, method, bias)
  _, sparse = one_shot.prune(program, params, state, target, tokens, 4, seed=0)
  x_BxLxD = params['embed']['tokens'][tokens]
  enters_BxL = entering(params, x_BxLxD, ROUTES[route])
  assert 0.05 < enters_BxL.mean() < 0.6
  alone = inputs_of_entering(program.model, params, x_BxLxD, enters_BxL)
  everyone = inputs_of_entering(program.model, params, x_BxLxD, np.ones_like(enters_BxL))
  masks, differs = tree.named(sparse.masks), 0
  for name in PRUNED:
    w, mask = params['block_0'], np.asarray(masks[f'block_0/{name}/kernel'])
    for part in (*name.split('/'), 'kernel'):
      w = w[part]
    found = []
    for rows in (alone[name], everyone[name]):
      if method == 'wanda':
        scores = np.abs(w) * np.linalg.norm(np.float64(rows), axis=0)[:, None]
        ranks = np.argsort(np.argsort(-scores, axis=0, kind='stable'), axis=0)
        found.append(ranks < round(DENSITY * len(w)))
      else:
        gram = jnp.asarray(rows.T @ rows / len(rows))
        found.append(np.asarray(prune_by_obs(jnp.asarray(w), gram, jnp.float32(DENSITY))[1]))
    assert_array_equal(mask, found[0], err_msg=name)
    differs += (mask != found[1]).mean() / len(PRUNED)
  assert differs > 0.01  # the tokens that skip would have made a difference


@pytest.mark.parametrize('kind', ['token_gate', 'layer_gate'])
def test_a_layer_that_no_token_enters_is_refused_in_one_line(kind, tiny_config):
  config = tiny_config(depth__name=kind, weight__name='wanda', weight__sparsity=0.5)
  program, target = build(config, VOCAB)
  params, state = random_variables(program.model, -50.0)
  if kind == 'layer_gate':
    params['depth_0']['logit'] = np.float32(-1.0)
  tokens = np.zeros((2, 16), np.int32)
  with pytest.raises(
    UserError, match=r'all calibration tokens skip the layer of block_0/'
  ) as refused:
    one_shot.prune(program, params, state, target, tokens, 2, seed=0)
  assert 'config.weight.dense' in str(refused.value) and '\n' not in str(refused.value)
  assert not jax.tree.leaves(state)
