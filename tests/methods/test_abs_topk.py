"""Magnitudes at named sites against NumPy, in every mode and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.pack import pack
from sparse_lm.methods.site.abs_topk import AbsTopK
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.plan import sites

VOCAB, WIDTH = 11, 16
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)


def largest(x, k):
  """The `k` largest magnitudes of each row, ties to the lower unit, by a stable sort."""
  rank = np.argsort(np.argsort(-np.abs(x), axis=-1, kind='stable'), axis=-1, kind='stable')
  return np.where(rank < k, x, 0)


@pytest.mark.parametrize('levels', [2, 10_000])
def test_the_largest_magnitudes_stay_with_their_signs_and_alone_get_a_gradient(levels):
  x = np.random.default_rng(levels).integers(-levels, levels + 1, (3, 5, 24)).astype('f')
  act = AbsTopK(density=0.25).act
  seen, pull_back = jax.vjp(jax.jit(act), x)
  assert_array_equal(seen, largest(x, 6))
  weights = np.random.default_rng(0).normal(size=x.shape).astype('f')
  rank = np.argsort(np.argsort(-np.abs(x), axis=-1, kind='stable'), axis=-1, kind='stable')
  assert_array_equal(pull_back(jnp.asarray(weights))[0], np.where(rank < 6, weights, 0))
  assert_array_equal(AbsTopK(density=1.0).act(x), x)
  assert (np.asarray(AbsTopK(density=0.01).act(x)) != 0).sum(axis=-1).max() == 1


@pytest.fixture(scope='module')
def model(tiny_config):
  return lm.from_config(tiny_config(site__name='abs_topk', model__kv_heads=1), VOCAB)


@pytest.fixture(scope='module')
def variables(model):
  shapes = plan_of(model).variables['params']
  draw = np.random.default_rng(1)
  return {'params': jax.tree.map(lambda a: draw.normal(0, 0.3, a.shape).astype('f'), shapes)}


# By hand: a quarter of 16 units of the stream, of 2 heads and of 1, and of 32 hidden units.
COUNTS = {'attention/input': 4, 'attention/output': 4, 'attention/query/output': 4}
COUNTS |= {'attention/key/output': 2, 'attention/value/output': 2}
COUNTS |= {'mlp/input': 4, 'mlp/hidden': 8, 'mlp/output': 4}


@pytest.mark.parametrize('mode', ['train', 'eval', 'decode'])
def test_the_eight_sites_keep_a_quarter_in_every_mode_and_no_other_site_does(
  mode, model, variables
):
  _, seen = jax.jit(lambda v: sites.run(model, v, TOKENS, mode=mode, read=['*']))(variables)
  most = {path: int((value != 0).sum(axis=-1).max()) for path, value in seen.items()}
  assert {path: most[f'block_0/{path}'] for path in COUNTS} == COUNTS
  assert most['residual_0'] == most['embed/head/input'] == WIDTH
  # What a matrix makes of sparse inputs is the site's product, here in NumPy.
  kernel = variables['params']['block_0']['attention']['query']['kernel']
  want = largest(np.asarray(seen['block_0/attention/input']) @ kernel, 4)
  assert_allclose(seen['block_0/attention/query/output'], want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures('packed_by_bytes')
def test_decoding_packed_and_not_gives_the_logits_of_whole_sequences(model, variables):
  whole = jax.jit(lambda v: model.apply(v, TOKENS))(variables)
  masks = jax.tree.map(lambda _: None, variables['params'])
  packed = pack(model, variables['params'], masks, {}).variables
  # Queries, keys and values come from one matrix, and are cut as they were apart.
  assert 'query_key_value' in packed['packed']['block_0']['attention']
  for given in (variables, packed):
    decoder = Decoder(model, given)
    logits, cache, _ = decoder.begin([row[:5] for row in TOKENS])
    assert_allclose(logits, whole[:, 4], rtol=1e-3, atol=1e-4)
    for place in range(5, TOKENS.shape[1]):
      position_B = np.full(2, place, np.int32)
      logits, cache = decoder.decode(given, cache, TOKENS[:, place], position_B)
      assert_allclose(logits, whole[:, place], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(('where', 'words'), [
  ('block_*/mlp/hiden', ["config.site.where 'block_*/mlp/hiden'", "did you mean 'block_*/mlp/hidden'"]),
  ('block_*/valid', ["config.site.where 'block_*/valid'", 'block_*/mlp/hidden']),
])  # fmt: skip
def test_an_unknown_site_is_refused_in_one_line_that_lists_the_sites(where, words, tiny_config):
  model = lm.from_config(tiny_config(site__name='abs_topk', site__where=(where,)), VOCAB)
  with pytest.raises(UserError) as refused:
    plan_of(model)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message
