"""Causality, remat, precision, dropout and the plain twin, on whole models of a few units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments.plain_twin import PlainLM
from sparse_lm.core.errors import UserError
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of

VOCAB, LENGTH = 13, 8
COMBINATIONS = {
  'default': {},
  'learned_layernorm': {'positions': 'learned', 'norm': 'layernorm', 'bias': True},
  'gqa': {'kv_heads': 2, 'init': 'gpt2'},
  'gqa_one_key_head_gated': {'kv_heads': 1, 'mlp': 'gated'},
  'bigram': {'bigram': True},
  'tied_bias': {'tied': True, 'bias': True},
  'tied_learned_gated': {'tied': True, 'positions': 'learned', 'mlp': 'gated'},
}


def model_of(vocab=VOCAB, mlp='dense', activation='relu2', layers=':', **fields):
  config = base.get_config()
  config.data.context = LENGTH
  config.model.update({'layers': 2, 'width': 16, 'hidden': 24, 'heads': 4, 'kv_heads': 4})
  config.model.update(fields)
  config.mlp.update({'name': mlp, 'layers': layers})
  config.activation.name = activation
  with config.unlocked():
    config.activation.update(slots.defaults('activation', activation))
  return lm.from_config(config, vocab)


def random_params(model, seed=0):
  """Every leaf random: the head starts at zero, which would hide most mistakes."""
  leaves, tree = jax.tree.flatten(plan_of(model).params)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(
    tree, [jnp.asarray(rng.standard_normal(a.shape) * 0.4, a.dtype) for a in leaves]
  )


def tokens_of(seed=0, batch=2):
  return np.random.default_rng(seed).integers(0, VOCAB, (batch, LENGTH))


@functools.cache
def applied(model):
  return jax.jit(lambda params, *inputs: model.apply({'params': params}, *inputs))


@pytest.mark.parametrize('name', COMBINATIONS)
def test_a_later_token_changes_no_earlier_logit(name):
  model = model_of(**COMBINATIONS[name])
  params, tokens, run = random_params(model), tokens_of(), applied(model)
  logits = np.asarray(run(params, tokens))
  assert logits.shape == (2, LENGTH, VOCAB) and logits.dtype == np.float32
  for t in range(LENGTH):
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % VOCAB
    other = np.asarray(run(params, changed))
    np.testing.assert_array_equal(other[:, :t], logits[:, :t])
    assert (np.abs(other - logits)[:, t:].max(axis=(0, 2)) > 1e-6).all()  # but all later ones


@pytest.mark.parametrize('name', COMBINATIONS)
def test_no_gradient_reaches_a_later_tokens_embedding(name):
  model = model_of(**COMBINATIONS[name] | {'vocab': LENGTH})
  params = random_params(model)
  tokens = np.arange(LENGTH)[None]  # each token once, so that row t of the table is position t

  def logits(table):
    embed = params['embed'] | {'tokens': table}
    return model.apply({'params': params | {'embed': embed}}, tokens)[0]

  # A tied table is the head too: row v reaches the logits of token v directly, so leave those out.
  tangents = np.abs(np.asarray(jax.jit(jax.jacfwd(logits))(params['embed']['tokens']))).max(axis=3)
  tangents[:, np.arange(LENGTH), np.arange(LENGTH)] = 0
  influence = tangents.max(axis=1)  # [position of the logits, position of the embedding]
  later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
  assert (influence[later] == 0).all() and (influence[~later] > 0).all()


@pytest.mark.parametrize(
  'fields',
  [
    {'remat': 'full'},
    {'remat': 'full', 'mlp': 'gated', 'bias': True, 'kv_heads': 2},
    {'remat': 'dots'},
    {'remat': 'dots_no_batch'},
  ],
)
def test_remat_changes_neither_values_nor_gradients(fields):
  plain, remat = model_of(**{**fields, 'remat': 'none'}), model_of(**fields)
  params, tokens = random_params(plain), tokens_of()

  def value_and_gradient(model):
    return jax.jit(
      jax.value_and_grad(lambda p: jnp.mean(model.apply({'params': p}, tokens, 'train') ** 2))
    )(params)

  (value, gradient), (value_2, gradient_2) = value_and_gradient(plain), value_and_gradient(remat)
  assert float(value) == pytest.approx(float(value_2), rel=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, gradient_2)


def test_remat_really_recomputes():
  def matmuls(model):
    loss = lambda p: jnp.sum(model.apply({'params': p}, tokens_of()))  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(random_params(model))).count('dot_general')

  # Of a layer 'dots' keeps all products, 'dots_no_batch' those with weights, 'full' none.
  found = [matmuls(model_of(remat=policy)) for policy in ('none', 'dots', 'dots_no_batch', 'full')]
  assert found[0] == found[1] < found[2] < found[3]


def test_an_unknown_remat_is_refused_with_the_nearest():
  with pytest.raises(UserError, match="remat 'dot': did you mean 'dots'"):
    model_of(remat='dot')


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
  exact, half = model_of(), model_of(precision='bfloat16')
  params, tokens = random_params(exact), tokens_of()
  stored = plan_of(half).params
  assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype('float32')}
  logits, reference = applied(half)(params, tokens), applied(exact)(params, tokens)
  assert logits.dtype == jnp.float32
  difference = np.abs(np.asarray(logits - reference))
  # Less precise, and not the same computation; the largest logits are about 4.
  assert 1e-4 < difference.max() < 0.15
  gradient = jax.eval_shape(
    jax.grad(lambda p: jnp.sum(half.apply({'params': p}, tokens) ** 2)), params
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}


def test_dropout_acts_in_training_only():
  dropped, plain = model_of(dropout=0.5), model_of()
  params, tokens = random_params(plain), tokens_of()
  run = jax.jit(
    lambda seed: dropped.apply(
      {'params': params}, tokens, 'train', rngs={'dropout': jax.random.key(seed)}
    )
  )
  reference = applied(plain)(params, tokens)
  np.testing.assert_array_equal(applied(dropped)(params, tokens), reference)
  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-3 and np.abs(run(0) - reference).max() > 1e-3
  # Without dropout a training pass needs no key and is the evaluation pass.
  trained = jax.jit(lambda p: plain.apply({'params': p}, tokens, 'train'))(params)
  np.testing.assert_allclose(trained, reference, atol=1e-5)


def test_a_slice_of_layers_gets_the_method_and_the_rest_the_other():
  params = plan_of(model_of(mlp='gated', layers='1::2', init='gpt2')).params
  assert set(params['block_0']['mlp']) == {'up', 'down'}
  assert set(params['block_1']['mlp']) == {'up', 'down', 'gate'}


@pytest.mark.parametrize('fields, names', [
  ({}, {'tokens', 'head'}),
  ({'tied': True}, {'tokens'}),
  ({'positions': 'learned'}, {'tokens', 'head', 'positions'}),
])  # fmt: skip
def test_embedding_parameters(fields, names):
  assert set(plan_of(model_of(**fields)).params['embed']) == names


def test_the_first_loss_is_that_of_a_uniform_guess():
  model = model_of()
  params = jax.jit(model.init)(jax.random.key(0), tokens_of())['params']
  logits = applied(model)(params, tokens_of())
  np.testing.assert_array_equal(logits, 0)


@pytest.mark.parametrize('vocab, context', [(13, 8), (31, 5)])
def test_logits_equal_the_plain_twins(vocab, context):
  ours = model_of(vocab, activation='gelu')
  twin = PlainLM(ours.spec)
  tokens = np.random.default_rng(1).integers(0, vocab, (3, context))
  params = random_params(ours, seed=2)
  copied = {
    'embed': {'embedding': params['embed']['tokens']},
    'head': params['embed']['head'],
    'norm': params['norm'],
  }
  for layer in range(2):
    block = params[f'block_{layer}']
    norms = {name: block[name] for name in ('norm_1', 'norm_2')}
    attention = {name: block['attention'][name] for name in ('query', 'key', 'value', 'out')}
    copied[f'block_{layer}'] = norms | attention | block['mlp']
  shapes = jax.eval_shape(twin.init, jax.random.key(0), tokens)['params']
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, copied)
  expected = jax.jit(twin.apply)({'params': copied}, tokens)
  np.testing.assert_allclose(applied(ours)(params, tokens), expected, atol=1e-5)
  assert np.abs(expected).max() > 0.5
