"""Attention methods that a user adds in one file: other projections and cache, or another mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sparse_lm.inference.decode import Decoder
from sparse_lm.layers.sow import SOWN
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import lm, plans, slots
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import cost, executed

VOCAB, CONTEXT, RANK, WIDTH, HEADS, HEAD = 11, 16, 5, 16, 2, 8

LATENT = '''
  """Keys and values from a short vector of each token, which is all that is cached."""

  import functools

  from sparse_lm.core.ranges import ranged
  from sparse_lm.kernels.attention import KeyValues
  from sparse_lm.kernels.cache import VALUES
  from sparse_lm.layers.attention import AttentionLayer, MaskedAttention
  from sparse_lm.layers.cache import Cache
  from sparse_lm.layers.linear import Linear
  from sparse_lm.layers.method import Traits


  class _LatentLayer(AttentionLayer, kw_only=True):
    rank: int

    def project(self, tokens, mode):
      spec, (b, l, _) = self.spec, tokens.x.shape
      heads = spec.heads * spec.head_dim
      q_BxLxF = Linear(spec, heads, name='query')(tokens.x)
      latent_BxSxR = Linear(spec, self.rank, name='latent')(tokens.x)
      positions, valid = tokens.positions, tokens.valid
      if self.caches(mode):
        cache = Cache.of(self, self.cache_size, tokens)
        latent_BxSxR = cache.extend('latents', latent_BxSxR[:, :, None], VALUES)[:, :, 0]
        positions, valid = cache.positions, cache.valid
      k_BxSxF = Linear(spec, heads, name='key')(latent_BxSxR)
      v_BxSxF = Linear(spec, heads, name='value')(latent_BxSxR)
      q, k, v = (a.reshape(b, -1, spec.heads, spec.head_dim) for a in (q_BxLxF, k_BxSxF, v_BxSxF))
      return q, KeyValues(k, v, positions, valid)


  class Latent(MaskedAttention):
    rank: int = ranged(5, '[1, 2^16]')

    @property
    def traits(self):
      return Traits(paper='DeepSeek-AI 2024, without rotary parts', saves='cached bytes')

    @property
    def layer(self):
      return functools.partial(_LatentLayer, rank=self.rank, cache_size=self.spec.context)
'''

SINKS = '''
  """The newest keys, and the first ones."""

  from sparse_lm.kernels.attention import Mask
  from sparse_lm.layers.attention import MaskedAttention
  from sparse_lm.layers.method import Traits


  class Sinks(MaskedAttention):
    @property
    def traits(self):
      return Traits(paper='Xiao et al. 2024', saves='scores and values of other keys', twin='full')

    @property
    def mask(self):
      return Mask(window=3, sinks=2)
'''


@pytest.fixture(scope='module')
def methods(tmp_path_factory, dropped_in):
  """Both files in a folder of their own among the methods of attention."""
  files = {'latent': LATENT, 'sinks': SINKS}
  with dropped_in('sparse_lm.methods.attention', tmp_path_factory.mktemp('methods'), files):
    yield


@pytest.fixture
def model_of(methods, tiny_config):
  return lambda **fields: lm.from_config(tiny_config(**fields), vocab=VOCAB)


def variables_of(model):
  draw = np.random.default_rng(0).normal
  params = jax.tree.map(
    lambda a: draw(0.0, 0.4, a.shape).astype('f') + (a.ndim == 1), plan_of(model).params
  )
  return jax.device_put({'params': params})


def tokens_of(batch=3):
  return np.random.default_rng(1).integers(0, VOCAB, (batch, CONTEXT)).astype(np.int32)


def test_a_latent_layer_equals_a_loop_over_queries(model_of):
  model = model_of(attention__name='latent')
  params = variables_of(model)['params']['block_0']['attention']
  assert params['latent']['kernel'].shape == (WIDTH, RANK)
  method = functools.partial(slots.method('attention', 'latent'), model.spec, name='attention')
  layer = method().layer(model.spec, method)
  x = np.random.default_rng(2).normal(size=(1, 6, WIDTH)).astype('f')
  tokens = Tokens(x, np.arange(6)[None], np.ones((1, 6), bool))
  found = layer.apply({'params': params}, tokens, 'eval')
  kernel = {name: np.float64(params[name]['kernel']) for name in params}
  q = (x[0] @ kernel['query']).reshape(6, HEADS, HEAD)
  k, v = ((x[0] @ kernel['latent'] @ kernel[n]).reshape(6, HEADS, HEAD) for n in ('key', 'value'))
  out = np.zeros((6, HEADS, HEAD))
  for t, h in np.ndindex(6, HEADS):
    weights = np.exp(k[: t + 1, h] @ q[t, h] / HEAD**0.5)
    out[t, h] = weights / weights.sum() @ v[: t + 1, h]
  assert_allclose(found[0], out.reshape(6, WIDTH) @ kernel['out'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'fields',
  [
    {'attention__name': 'latent'},
    {'attention__name': 'head_gate', 'attention__inner__name': 'latent'},
    {'attention__name': 'latent', 'depth__name': 'token_gate'},
    {'attention__name': 'sinks'},
  ],
  ids=lambda fields: '-'.join(fields.values()),
)
def test_decoding_equals_one_pass_over_the_sequence(fields, model_of):
  model = model_of(**fields)
  variables, tokens = variables_of(model), tokens_of()
  full = jax.jit(lambda t: model.apply(variables, t, mode='decode'))(tokens)
  decoder, rows = Decoder(model, variables), np.arange(3)
  logits, cache, place = decoder.begin([row[:n] for row, n in zip(tokens, (3, 5, 8))])
  while place.max() < CONTEXT:
    assert_allclose(logits, full[rows, place - 1], rtol=1e-4, atol=2e-5)
    logits, cache = decoder.decode(variables, cache, tokens[rows, place], place)
    place = place + 1


def test_a_latent_layer_caches_its_short_vectors_and_no_keys(model_of):
  gated = {'attention__name': 'head_gate', 'attention__inner__name': 'latent'}
  for fields in ({'attention__name': 'latent'}, gated):
    model = model_of(**fields)
    cache = lm.cache_shapes(model, variables_of(model), 2)['block_0']['attention']
    assert {name: leaf.shape for name, leaf in cache.items()} == {
      'latents': (2, 32, RANK),
      'position': (2, 32),
      'length': (2,),
    }


@pytest.mark.parametrize('mode', ['train', 'eval'])
@pytest.mark.parametrize('name', ['latent', 'sinks'])
def test_what_they_execute_is_charged_or_has_a_reason(name, mode, model_of):
  model = model_of(attention__name=name)
  charged = plans.ledger(model, CONTEXT, mode)
  found = executed.differences(charged, plans.traced(model, CONTEXT, mode))
  assert not [reason for reason in found if reason.startswith(executed.NO_REASON)], found
  values = cost.causal_pairs(charged)['block_0/attention/attention/values'].flops
  # Of a window of three and two sinks: 1 + 2 + 3 + 4, and 5 for each later query.
  pairs = 10 + 5 * (CONTEXT - 4) if name == 'sinks' else CONTEXT * (CONTEXT + 1) / 2
  assert values == pytest.approx(2 * WIDTH * pairs / CONTEXT)


@pytest.mark.parametrize('name', ['latent', 'sinks'])
def test_a_later_token_changes_no_earlier_logit_and_all_parameters_learn(name, model_of):
  model = model_of(attention__name=name)
  variables, tokens = variables_of(model), tokens_of()
  run = jax.jit(lambda params, t: model.apply({'params': params}, t, mode='train', mutable=SOWN)[0])
  before = run(variables['params'], tokens)
  other = np.where(np.arange(CONTEXT) < 9, tokens, (tokens + 3) % VOCAB)
  after = run(variables['params'], other)
  assert_allclose(after[:, :9], before[:, :9], rtol=1e-6, atol=1e-6)
  assert np.abs(after - before)[:, 9:].max() > 1e-3
  grads = jax.grad(lambda params: jnp.sum(jax.nn.log_softmax(run(params, tokens))[..., 0]))(
    variables['params']
  )
  assert all(np.isfinite(g).all() and np.abs(g).any() for g in jax.tree.leaves(grads))
