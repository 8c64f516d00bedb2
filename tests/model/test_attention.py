"""Keys, heads, positions and validity, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.layers.rope import rotate
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of

VOCAB, LENGTH, WIDTH, HEADS = 13, 8, 16, 4


def model_of(**fields):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update(
    {'layers': 2, 'width': WIDTH, 'hidden': 24, 'heads': HEADS, 'kv_heads': HEADS}
  )
  config.model.update(fields)
  return lm.from_config(config, VOCAB)


def random_params(model, seed=0):
  leaves, tree = jax.tree.flatten(plan_of(model).params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree, [jnp.asarray(rng.standard_normal(a.shape) * 0.4, a.dtype) for a in leaves]
  )


def tokens_of(seed=0, batch=2):
  return np.random.default_rng(seed).integers(0, VOCAB, (batch, LENGTH))


@functools.cache
def applied(model):
  return jax.jit(
    lambda params, tokens, *where: model.apply({'params': params}, tokens, 'eval', *where)
  )


def run(model, params, tokens, positions=None, valid=None):
  if positions is None:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  if valid is None:
    valid = np.ones(tokens.shape, bool)
  return np.asarray(applied(model)(params, tokens, positions, valid))


def softmax_attention(q, k, v, positions, key_positions, valid):
  """One query at a time, float64; a head reads the key head of its group."""
  b, l, h, width = q.shape
  out = np.zeros((b, l, h, v.shape[-1]))
  for i in range(b):
    for t in range(l):
      for head in range(h):
        group = head // (h // k.shape[2])
        read = np.flatnonzero((key_positions[i] <= positions[i, t]) & valid[i])
        scores = k[i, read, group] @ q[i, t, head] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        out[i, t, head] = weights / weights.sum() @ v[i, read, group]
  return out


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=25)
def test_full_attention_equals_numpy(seed, groups):
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((2, 5, 4, 6))
  k, v = rng.standard_normal((2, 7, groups, 6)), rng.standard_normal((2, 7, groups, 6))
  # Queries and keys of any positions, in any order, as when a layer skips tokens.
  key_positions = np.stack([rng.permutation(9)[:7] for _ in range(2)])
  valid = rng.random((2, 7)) < 0.7
  valid[:, 0] = True
  positions = np.maximum(rng.integers(0, 9, (2, 5)), key_positions[:, :1])
  found = full_attention(q, k, v, positions, key_positions, valid)
  expected = softmax_attention(q, k, v, positions, key_positions, valid)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@jax.jit
def full_attention(q, k, v, positions, key_positions, valid):
  module = slots.method('attention', 'full')(spec=model_of().spec)
  x = jnp.zeros((*q.shape[:2], WIDTH))
  q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
  tokens = Tokens(x, positions, jnp.ones(positions.shape, bool))
  return module.apply({}, tokens, q, KeyValues(k, v, key_positions, valid), 'eval')


@pytest.mark.parametrize('kv_heads', [1, 2])
def test_gqa_equals_mha_with_repeated_key_and_value_heads(kv_heads):
  grouped, full = model_of(kv_heads=kv_heads), model_of()
  params, tokens = random_params(grouped), tokens_of()
  repeated = jax.tree.map(lambda a: a, params)
  for layer in range(2):
    attention = repeated[f'block_{layer}']['attention']
    for name in ('key', 'value'):
      kernel = np.asarray(attention[name]['kernel']).reshape(WIDTH, kv_heads, WIDTH // HEADS)
      attention[name] = {
        'kernel': np.repeat(kernel, HEADS // kv_heads, axis=1).reshape(WIDTH, WIDTH)
      }
  shapes = jax.tree.map(jnp.shape, repeated)
  assert shapes == jax.tree.map(jnp.shape, plan_of(full).params)
  np.testing.assert_allclose(run(full, repeated, tokens), run(grouped, params, tokens), atol=1e-5)


def test_rotate_turns_pairs_by_their_angle():
  rng = np.random.default_rng(0)
  x, positions = rng.standard_normal((1, 3, 2, 6)), np.array([[0, 2, 9]])
  spec = model_of(head_width=6).spec
  found = np.asarray(rotate(spec, jnp.asarray(x, jnp.float32), positions))
  for t, position in enumerate(positions[0]):
    for j in range(3):
      # A pair as a complex number, multiplied by exp(i position 10000^(-2j/6)).
      turned = (x[0, t, :, j] + 1j * x[0, t, :, j + 3]) * np.exp(1j * position * 1e4 ** (-j / 3))
      np.testing.assert_allclose(found[0, t, :, j], turned.real, atol=1e-6)
      np.testing.assert_allclose(found[0, t, :, j + 3], turned.imag, atol=1e-6)


@pytest.mark.parametrize('fields', [{}, {'kv_heads': 2, 'norm': 'layernorm'}])
@pytest.mark.parametrize('shift', [1, 50])
def test_rotary_logits_depend_on_relative_positions_only(fields, shift):
  model = model_of(**fields)
  params, tokens = random_params(model), tokens_of()
  positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
  logits = run(model, params, tokens, positions)
  np.testing.assert_allclose(run(model, params, tokens, positions + shift), logits, atol=2e-5)
  # And on those they do depend.
  assert np.abs(run(model, params, tokens, 3 * positions) - logits).max() > 1e-2


def test_learned_positions_are_looked_up():
  model = model_of(positions='learned')
  params, tokens = random_params(model), tokens_of()
  positions = np.array([[0, 2, 3, 4, 5, 6, 7, 7], [1, 2, 3, 4, 5, 6, 7, 7]])
  table = params['embed'] | {'positions': params['embed']['positions'][positions[0]]}
  expected = run(model, params | {'embed': table}, tokens)[0, :6]
  np.testing.assert_allclose(run(model, params, tokens, positions)[0, :6], expected, atol=1e-5)


def test_positions_in_order_are_looked_up_without_a_scatter_in_the_gradient():
  model = model_of(positions='learned')
  params, tokens = random_params(model), tokens_of()
  positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)

  def loss(params, *given):
    return jnp.sum(jnp.sin(model.apply({'params': params}, tokens, 'eval', *given)))

  found, want = jax.grad(loss)(params), jax.grad(loss)(params, positions)
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, want)
  scatters = [
    str(jax.make_jaxpr(jax.grad(loss))(*x)).count('scatter')
    for x in ([params], [params, positions])
  ]
  assert scatters[0] < scatters[1]


def test_default_positions_count_from_zero_and_all_tokens_are_valid():
  model = model_of()
  params, tokens = random_params(model), tokens_of()
  defaults = np.asarray(applied(model)(params, tokens))
  np.testing.assert_array_equal(run(model, params, tokens), defaults)


def test_sequences_with_tokens_left_out_are_not_whole():
  shape = (2, LENGTH)
  places = np.broadcast_to(np.arange(LENGTH), shape)
  tokens = Tokens(jnp.zeros((*shape, WIDTH)), places, np.ones(shape, bool), whole=True)
  assert tokens.replace(valid=tokens.valid).whole and tokens.replace(x=tokens.x + 1).whole
  some = np.arange(LENGTH) % 2 == 0
  index = np.flatnonzero(some)[None].repeat(2, 0)
  for other in (tokens.only(some[None]), tokens.take(index), tokens.replace(positions=places + 1)):
    assert not other.whole


def test_invalid_tokens_are_not_read():
  model = model_of(kv_heads=2)
  params, tokens = random_params(model), tokens_of()
  valid = np.ones(tokens.shape, bool)
  valid[0, [0, 3]] = valid[1, 5] = False
  logits = run(model, params, tokens, valid=valid)
  other = run(model, params, np.where(valid, tokens, (tokens + 3) % VOCAB), valid=valid)
  np.testing.assert_array_equal(other[valid], logits[valid])
  # Those after an invalid token would otherwise have read it.
  assert np.abs(run(model, params, tokens) - logits)[0, 4:].max() > 1e-3


def test_leaving_tokens_out_equals_marking_them_invalid():
  """What lets a layer skip tokens: the others keep their places."""
  model = model_of()
  params, tokens = random_params(model), tokens_of()
  left = np.array([0, 1, 4, 6, 7])
  valid = np.isin(np.arange(LENGTH), left)[None].repeat(2, 0)
  marked = run(model, params, tokens, valid=valid)[:, left]
  short = run(model, params, tokens[:, left], positions=left[None].repeat(2, 0))
  np.testing.assert_allclose(short, marked, atol=1e-5)


def test_sequences_of_a_batch_do_not_influence_each_other():
  model = model_of()
  params, tokens = random_params(model), tokens_of()
  both = run(model, params, tokens)
  np.testing.assert_allclose(run(model, params, tokens[1:]), both[1:], atol=1e-5)
