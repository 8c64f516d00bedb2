"""Decoding token by token equals one pass over the whole sequence, for every method."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.core.estimator import ESTIMATORS
from sparse_lm.inference.decode import Decoder
from sparse_lm.inference.sample import Sampling
from sparse_lm.layers.sow import SOWN
from sparse_lm.model import lm, slots
from sparse_lm.model.plans import plan_of

VOCAB, CONTEXT, BATCH = 11, 16, 3
GATES = [
  (slot, name)
  for slot in lm.LAYER_SLOTS
  for name in slots.names(slot)
  if 'estimator' in slots.defaults(slot, name)
]
# Every method, one of each slot at a time.
COMPUTING = [slot for slot in slots.SLOTS if slot != 'weight']
EVERY = [
  {f'{slot}.name': name for slot, name in zip(COMPUTING, methods) if name}
  for methods in itertools.zip_longest(*map(slots.names, COMPUTING))
]
# Fewer of what takes long to compile.
FEW = {
  name: {f'{slot}.{field}': value}
  for slot, field, value in (
    ('mlp', 'experts', 4),
    ('site', 'where', ('block_*/mlp/input',)),
  )
  for name in slots.names(slot)
  if slots.defaults(slot, name).get(field)
}
MOBA = {'attention.name': 'moba', 'attention.block': 2, 'attention.k': 2}
CASES = {
  **{
    '-'.join(own.values()): functools.reduce(
      dict.__or__, (FEW.get(n, {}) for n in own.values()), own
    )
    for own in EVERY
  },
  'plain': {},
  'depth-mixture_of_depths': {'depth.name': 'mixture_of_depths'},
  **{
    f'token_gate-{estimator}': {'depth.name': 'token_gate', 'depth.estimator': estimator}
    for estimator, found in ESTIMATORS.items()
    if found.learned
  },
  'window 1': {'attention.name': 'sliding_window', 'attention.window': 1},
  'window 5': {'attention.name': 'sliding_window', 'attention.window': 5},
  'window behind a gate': {
    'attention.name': 'head_gate',
    'attention.inner.name': 'sliding_window',
    'attention.inner.window': 3,
  },
  'grouped queries': {'model.kv_heads': 1},
  'learned positions': {
    'model.positions': 'learned',
    'model.norm': 'layernorm',
    'model.bias': True,
  },
  'two of three experts': {'mlp.name': 'moe_topk', 'mlp.experts': 3, 'mlp.k': 2},
  'expert choice of many': {'mlp.name': 'expert_choice', 'mlp.visits': 3.0},
  'topk keys in a layer that tokens skip': {
    'attention.name': 'topk_keys',
    'attention.k': 3,
    'depth.name': 'mixture_of_depths',
  },
  'few blocks of grouped queries': MOBA | {'model.kv_heads': 1},
  'blocks in a layer that tokens skip': MOBA | {'depth.name': 'mixture_of_depths'},
  'tied': {'model.tied': True, 'model.init': 'gpt2'},
  'bigrams': {'model.bigram': True},
}
# Two layers where what one decides is what the next one reads.
LAYERS = {name: 1 + ('depth.name' in fields) for name, fields in CASES.items()}


@pytest.fixture(scope='module')
def case(tiny_config):
  """`case(name) -> (Decoder, full)`, `full(tokens, valid)` the logits of one uncached pass."""

  @functools.cache
  def build(name):
    fields = {'model.layers': LAYERS[name]} | CASES[name]
    model = lm.from_config(tiny_config(**fields), vocab=VOCAB)
    decoder = Decoder(model, random_variables(model))
    run = jax.jit(lambda v, t, valid: model.apply(v, t, mode='decode', valid_BxL=valid))
    return decoder, functools.partial(run, decoder.variables)

  return build


def random_variables(model):
  draw = np.random.default_rng(0).normal
  shapes = plan_of(model).variables
  # Gates of either kind must open and close: their logits spread around zero.
  params = jax.tree.map(
    lambda a: draw(0.5 * (a.ndim == 1), 0.4, a.shape).astype('f'), shapes['params']
  )
  others = {name: shapes[name] for name in shapes if name not in ('params', *SOWN)}
  thresholds = jax.tree.map(lambda a: np.full(a.shape, 1 / a.size, a.dtype), others)
  return jax.device_put({'params': params, **thresholds})


# Lengths that share the compiled prefill of 8 tokens.
# Cases of one method beside others that stay in `make test`.
SLOW = (
  'topk keys in a layer that tokens skip',
  'token_gate-reinforce',
  'token_gate-hard_concrete',
  'token_gate-soft',
  'token_gate-gumbel_sigmoid',
  'token_gate-straight_through',
  'depth-mixture_of_depths',
  'window behind a gate',
  'few blocks of grouped queries',
  'expert choice of many',
  'blocks in a layer that tokens skip',
)


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 8), min_size=3, max_size=3))
def test_every_position_of_unequal_prompts_equals_the_full_pass(name, seed, lengths, case):
  decoder, full = case(name)
  check(decoder, full, seed, [*lengths[:2], max(5, lengths[2])])


def check(decoder, full, seed, lengths):
  tokens = np.random.default_rng(seed).integers(0, VOCAB, (BATCH, CONTEXT)).astype(np.int32)
  want = np.asarray(full(tokens, np.ones(tokens.shape, bool)))
  close = functools.partial(assert_allclose, rtol=1e-4, atol=2e-5)
  logits, cache, place = decoder.begin([row[:n] for row, n in zip(tokens, lengths)])
  rows = np.arange(BATCH)
  close(logits, want[rows, place - 1])
  while place.max() < CONTEXT:
    logits, cache = decoder.decode(decoder.variables, cache, tokens[rows, place], place)
    close(logits, want[rows, place])
    place = place + 1


def test_decode_mode_is_evaluation_without_dropped_tokens(tiny_config):
  tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, CONTEXT)).astype(np.int32)
  full_experts = {'mlp.name': 'moe_topk', 'mlp.experts': 2, 'mlp.eval_capacity': 0.5}
  for fields, same in (({'depth.name': 'token_gate'}, True), (full_experts, False)):
    model = lm.from_config(tiny_config(**fields), vocab=VOCAB)
    variables = random_variables(model)
    logits = [np.asarray(model.apply(variables, tokens, mode=mode)) for mode in ('eval', 'decode')]
    assert np.allclose(*logits, rtol=1e-4, atol=1e-5) == same


@pytest.mark.parametrize(('slot', 'name'), GATES)
def test_random_gates_do_not_decode(slot, name, tiny_config):
  fields = {f'{slot}.name': name, f'{slot}.estimator': 'random'}
  model = lm.from_config(tiny_config(**fields), vocab=VOCAB)
  with pytest.raises(UserError, match=f'config.{slot}.name={name!r}.*cannot decode'):
    Decoder(model, {})


def held(cache, batch=BATCH):
  """Tokens of each sequence that each layer has seen."""
  return {layer: cache[layer]['attention']['length'].tolist() for layer in cache}


def test_a_window_holds_no_more_keys_than_it_reads(case):
  shapes = {}
  for name in ('plain', 'window 5', 'window behind a gate'):
    decoder, _ = case(name)
    shapes[name] = decoder.cache(BATCH)['block_0']['attention']['keys'].shape
  # A slot more than is held, for what is not to be read, and whole rows of 16.
  assert shapes['plain'] == (BATCH * 2, 8, 32)
  assert shapes['window 5'] == shapes['window behind a gate'] == (BATCH * 2, 8, 16)


def test_each_layer_counts_the_tokens_that_entered_it(case):
  decoder, _ = case('depth-mixture_of_depths')
  tokens = np.random.default_rng(1).integers(0, VOCAB, (BATCH, CONTEXT)).astype(np.int32)
  _, seen = decoder.model.apply(decoder.variables, tokens[:, :8], mutable=['gates'])
  _, cache, _ = decoder.begin(list(tokens[:, :8]))
  for layer in (0, 1):
    share = np.mean(seen['gates'][f'depth_{layer}']['active'])
    assert 0 < share < 1
    assert sum(held(cache)[f'block_{layer}']) == round(share * BATCH * 8)


def test_greedy_text_is_that_of_full_passes(case):
  decoder, full = case('plain')
  prompts = [np.array([1, 2, 3], np.int32), np.array([4], np.int32)]
  made = np.stack(list(decoder.generate(prompts, 6, Sampling(temperature=0))), axis=1)
  for prompt, found in zip(prompts, made):
    text = list(prompt)
    for _ in range(6):
      padded = np.zeros((BATCH, CONTEXT), np.int32)
      padded[0, : len(text)] = text
      text.append(int(full(padded, np.ones(padded.shape, bool))[0, len(text) - 1].argmax()))
    assert_array_equal(found, text[len(prompt) :])


def test_draws_repeat_with_their_seed_and_differ_from_token_to_token(case):
  decoder, _ = case('plain')
  sampling = Sampling(temperature=5.0)

  def text(seed):
    return np.stack(list(decoder.generate([np.array([1])] * 2, 8, sampling, seed)), axis=1)

  assert_array_equal(text(3), text(3))
  assert (text(3) != text(4)).any()
  assert (text(3)[0] != text(3)[1]).any() and len(set(text(3)[0].tolist())) > 2


@pytest.mark.parametrize(
  ('lengths', 'tokens', 'named'),
  [
    ((CONTEXT,), 1, f'--prompt has {CONTEXT} tokens; valid: 1 to {CONTEXT - 1}'),
    ((0,), 1, '--prompt has 0 tokens'),
    ((3, 10), 7, f'--tokens=7 after a prompt of 10 tokens; valid: 1 to {CONTEXT - 10}'),
    ((3,), 0, '--tokens=0'),
  ],
)
def test_prompts_and_tokens_that_do_not_fit_are_named(lengths, tokens, named, case):
  decoder, _ = case('plain')
  prompts = [np.ones(n, np.int32) for n in lengths]
  with pytest.raises(UserError, match=named):
    next(decoder.generate(prompts, tokens, Sampling()))


def test_a_cache_is_one_buffer_that_is_written_in_place(case):
  decoder, _ = case('plain')
  _, cache, place = decoder.begin([np.ones(4, np.int32)])
  before = jax.tree.map(jnp.shape, cache)
  _, after = decoder.decode(decoder.variables, cache, np.ones(1, np.int32), place)
  assert jax.tree.map(jnp.shape, after) == before
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
