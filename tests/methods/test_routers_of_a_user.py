"""Routers that a user adds in one file, against loops over tokens in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.inference.decode import Decoder
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.spec import Spec
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import executed

VOCAB, CONTEXT, WIDTH, HIDDEN, EXPERTS, RATE = 11, 16, 16, 32, 8, 0.25

RELU = '''
  """Experts whose ReLU router fires."""

  import jax
  import jax.numpy as jnp

  from sparse_lm.layers.method import Traits
  from sparse_lm.layers.mixture import MixtureOfExperts
  from sparse_lm.layers.router import Router
  from sparse_lm.layers.routing import Routing
  from sparse_lm.plan.cost import Gating


  class ReLURouted(MixtureOfExperts):
    @property
    def traits(self):
      return Traits(paper='Wang et al. 2024', saves='experts', twin='dense', gating=Gating())

    def route(self, x_TxD, mode):
      weight_TxE = jax.nn.relu(Router(self.spec, self.experts, name='router')(x_TxD))
      expert_TxE = jnp.where(weight_TxE > 0, jnp.arange(self.experts), self.experts)
      total = jnp.maximum(jnp.sum(weight_TxE, axis=-1, keepdims=True), 1e-6)
      return Routing(expert_TxE, weight_TxE, weight_TxE / total, visits=float(self.experts))
'''

BIASED = '''
  """A shared expert beside others that are balanced by a bias, without a loss."""

  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from sparse_lm.layers import dispatch
  from sparse_lm.layers.linear import Linear
  from sparse_lm.layers.method import Traits
  from sparse_lm.layers.mixture import MixtureOfExperts
  from sparse_lm.layers.router import Router
  from sparse_lm.layers.routing import Routing
  from sparse_lm.plan.cost import Gating


  class Biased(MixtureOfExperts):
    rate: float = 0.25

    @property
    def traits(self):
      return Traits(paper='Wang et al. 2024', saves='experts', twin='dense', gating=Gating())

    def route(self, x_TxD, mode):
      score_TxE = jax.nn.sigmoid(Router(self.spec, self.experts, name='router')(x_TxD))
      bias = self.variable('router', 'bias', jnp.zeros, (self.experts,))
      _, expert_TxK = jax.lax.top_k(jax.lax.stop_gradient(score_TxE) + bias.value, 2)
      weight_TxK = jnp.take_along_axis(score_TxE, expert_TxK, axis=-1)
      if mode == 'train' and self.is_mutable_collection('router'):
        load_E = dispatch.load(expert_TxK, self.experts)
        bias.value = bias.value + self.rate * jnp.sign(jnp.mean(load_E) - load_E)
      return Routing(expert_TxK, weight_TxK, score_TxE, visits=2.0)

    @nn.compact
    def __call__(self, x_BxLxD, mode):
      h_BxLxF = nn.silu(Linear(self.spec, 8, name='shared_up')(x_BxLxD))
      shared_BxLxD = Linear(self.spec, self.spec.width, role='out', name='shared_down')(h_BxLxF)
      return shared_BxLxD + super().__call__(x_BxLxD, mode)
'''


@pytest.fixture(scope='module', autouse=True)
def methods(tmp_path_factory, dropped_in):
  """Both files in a folder of their own among the methods of the MLP slot."""
  files = {'relu_routed': RELU, 'biased': BIASED}
  with dropped_in('sparse_lm.methods.mlp', tmp_path_factory.mktemp('methods'), files):
    yield


@pytest.fixture
def mixture(tiny_config):
  """`mixture(name) -> (module, its variables, x)`, every parameter drawn at random."""

  def make(name):
    spec = Spec.from_config(tiny_config().model, VOCAB, CONTEXT)
    relu2 = functools.partial(slots.method('activation', 'relu2'), name='activation')
    module = slots.method('mlp', name)(spec=spec, activation=relu2)
    draw, x = np.random.default_rng(0), np.random.default_rng(1).normal(size=(2, 6, WIDTH))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x.astype('f'), 'eval'))
    kept = {name: a for name, a in shapes.items() if name not in SOWN}
    variables = jax.tree.map(lambda a: draw.normal(0, 0.5, a.shape).astype('f'), kept)
    return module, variables, x.astype('f')

  return make


def expert(params, e, x):
  p = {name: np.float64(a) for name, a in params['experts'].items()}
  return np.maximum(x @ p['up'][e], 0) ** 2 @ p['down'][e]


def by_loop(params, x_TxD, weight_TxE):
  """Every token through every expert, one after the other, weighted."""
  y_TxD = np.zeros(x_TxD.shape)
  for t, e in zip(*np.nonzero(weight_TxE)):
    y_TxD[t] += weight_TxE[t, e] * expert(params, e, x_TxD[t])
  return y_TxD


@pytest.mark.parametrize('executor', ['sort', 'einsum'])
def test_a_relu_router_runs_the_experts_that_fire(executor, mixture):
  module, variables, x = mixture('relu_routed')
  y, sown = module.clone(executor=executor).apply(variables, x, 'train', mutable=SOWN)
  flat = np.float64(x.reshape(-1, WIDTH))
  weight = np.maximum(flat @ variables['params']['router']['kernel'], 0)
  assert 0.3 < (weight > 0).mean() < 0.7
  want = by_loop(variables['params'], flat, weight)
  assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-3)
  assert_allclose(sown['gates']['active'], (weight > 0).mean(-1).reshape(2, 6), rtol=1e-6)
  load = (weight > 0).sum(0)
  assert_allclose(sown['stats']['load'], load / load.sum(), rtol=1e-6)


def test_a_bias_moves_the_choice_and_not_the_weight_and_a_shared_expert_runs_for_all(mixture):
  module, variables, x = mixture('biased')
  y, after = module.apply(variables, x, 'train', mutable=[*SOWN, 'router'])
  params, flat = variables['params'], np.float64(x.reshape(-1, WIDTH))
  score = 1 / (1 + np.exp(-flat @ params['router']['kernel']))
  bias = variables['router']['bias']
  chosen = np.argsort(-(score + bias), axis=-1)[:, :2]
  weight = np.zeros(score.shape)
  np.put_along_axis(weight, chosen, np.take_along_axis(score, chosen, axis=-1), axis=-1)
  h = flat @ params['shared_up']['kernel']
  want = by_loop(params, flat, weight) + h / (1 + np.exp(-h)) @ params['shared_down']['kernel']
  assert_allclose(y.reshape(want.shape), want, rtol=1e-4, atol=1e-3)
  load = np.bincount(chosen.ravel(), minlength=EXPERTS)
  moved = bias + RATE * np.sign(load.mean() - load)
  assert_allclose(after['router']['bias'], moved, rtol=1e-6)
  assert load.max() > load.min() and 'losses' not in after
  _, after = module.apply(variables, x, 'eval', mutable=[*SOWN, 'router'])
  assert_array_equal(after['router']['bias'], bias)


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
@pytest.mark.parametrize('name', ['relu_routed', 'biased'])
def test_what_they_execute_is_charged_or_has_a_reason(name, mode, tiny_config):
  model = lm.from_config(tiny_config(mlp__name=name), vocab=VOCAB)
  charged = plans.ledger(model, CONTEXT, 'train' if mode == 'train' else 'eval')
  found = executed.differences(charged, plans.traced(model, CONTEXT, mode))
  assert not [reason for reason in found if reason.startswith(executed.NO_REASON)], found
  visits = {'relu_routed': EXPERTS, 'biased': 2}[name]
  assert charged['block_0/mlp/experts/up/linear'].flops == 2 * visits * WIDTH * HIDDEN


@pytest.mark.parametrize('name', ['relu_routed', 'biased'])
@pytest.mark.parametrize('batch', [1, 3])
def test_decoding_equals_one_pass_over_the_sequence(name, batch, tiny_config):
  model = lm.from_config(tiny_config(mlp__name=name), vocab=VOCAB)
  draw, shapes = np.random.default_rng(0), plan_of(model).variables
  kept = {part: shapes[part] for part in shapes if part not in SOWN}
  variables = jax.tree.map(lambda a: jnp.asarray(draw.normal(0.2, 0.4, a.shape), a.dtype), kept)
  tokens = draw.integers(0, VOCAB, (batch, CONTEXT)).astype(np.int32)
  full = jax.jit(lambda t: model.apply(variables, t, mode='decode'))(tokens)
  decoder, rows = Decoder(model, variables), np.arange(batch)
  logits, cache, place = decoder.begin(list(tokens[:, :5]))
  while place.max() < CONTEXT:
    assert_allclose(logits, full[rows, place - 1], rtol=1e-3, atol=1e-4)
    logits, cache = decoder.decode(variables, cache, tokens[rows, place], place)
    place = place + 1
