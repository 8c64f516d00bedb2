"""Several tokens that continue a prefix at once, and tokens that are removed from a cache again."""

import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_decode import BATCH, CASES, CONTEXT, EVERY, VOCAB, random_variables

from sparse_lm.inference.decode import Decoder
from sparse_lm.layers import cache as caches
from sparse_lm.layers.cache import LENGTH, POSITION
from sparse_lm.model import lm

TOGETHER = 4
# A cache for single tokens would have 15 slots for 15 keys, and wraps around; one for several tokens
# has as many for 12 keys, and wraps around where a wrong token entered a layer that the right one skips.
WIDE = {'attention.name': 'sliding_window', 'attention.window': 15, 'data.context': 48}
SKIPPED = WIDE | {'attention.window': 12, 'depth.name': 'mixture_of_depths', 'depth.capacity': 0.6}
BLOCKS = 'blocks in a layer that tokens skip'
OWN = {
  **{name: CASES[name] for name in map('-'.join, (own.values() for own in EVERY))},
  **{name: CASES[name] for name in ('plain', 'window 5', 'window behind a gate', BLOCKS)},
  'a wide window': WIDE,
  'a wide window that tokens skip': SKIPPED,
}
# Each kind of attention once; the others differ in what layers do besides.
KINDS = [name for name in OWN if '-moba-' in name or '-topk_keys-' in name]
QUICK = ('plain', 'a wide window', *KINDS)


@pytest.fixture(scope='module')
def decoder_of(tiny_config):
  """`decoder_of(name) -> Decoder` of two layers, with random weights."""

  @functools.cache
  def build(name):
    model = lm.from_config(tiny_config(**{'model.layers': 2}, **OWN[name]), vocab=VOCAB)
    return Decoder(model, random_variables(model))

  return build


def full(decoder, tokens):
  """Logits of one pass without a cache."""
  return np.asarray(
    jax.jit(lambda v: decoder.model.apply(v, tokens, mode='decode'))(decoder.variables)
  )


@functools.cache
def step(decoder):
  """`(variables, cache, tokens_BxL, positions_BxL) -> (logits_BxLxV, cache)` for several tokens."""

  def run(variables, cache, tokens_BxL, positions_BxL):
    logits, changed = decoder.model.apply(
      {**variables, 'cache': cache},
      tokens_BxL,
      mode='decode',
      positions_BxL=positions_BxL,
      continues=True,
      mutable=['cache'],
    )
    return logits, changed['cache']

  return jax.jit(run)


def after(place_B, count):
  return place_B[:, None] + np.arange(count)


@pytest.mark.parametrize(
  'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OWN]
)
def test_several_tokens_equal_the_full_pass_after_wrong_ones_are_taken_back(name, decoder_of):
  decoder = decoder_of(name)
  draw = np.random.default_rng(3)
  context = decoder.model.spec.context
  tokens = draw.integers(0, VOCAB, (BATCH, context)).astype(np.int32)
  want = full(decoder, tokens)
  rows, run = np.arange(BATCH)[:, None], step(decoder)
  _, cache, place_B = decoder.begin([row[:n] for row, n in zip(tokens, (5, 2, 7))], TOGETHER)
  while place_B.max() + TOGETHER < context:
    at = after(place_B, TOGETHER)
    right_B = draw.integers(
      1, TOGETHER + 1, BATCH
    )  # of each sequence so many tokens are the text's
    wrong = np.arange(TOGETHER) >= right_B[:, None]
    given = np.where(wrong, (tokens[rows, at] + 1) % VOCAB, tokens[rows, at])
    logits, cache = run(decoder.variables, cache, given, at)
    close = functools.partial(assert_allclose, rtol=1e-4, atol=2e-5)
    close(np.asarray(logits)[~wrong], want[rows, at][~wrong])
    place_B = place_B + right_B
    cache = caches.truncated(cache, place_B)
  decoded = decoder.decode(decoder.variables, cache, tokens[rows[:, 0], place_B], place_B)[0]
  close(decoded, want[rows[:, 0], place_B])


def read(layer, batch):
  """Of each sequence, what a cache holds by the position of the token."""
  found = []
  for b in range(batch):
    position, length = np.asarray(layer[POSITION][b]), int(layer[LENGTH][b])
    slots = len(position)
    held = np.flatnonzero((np.arange(slots) < min(length, slots - 1)) & (position < CONTEXT))
    heads = len(layer['keys']) // batch
    mine = slice(b * heads, (b + 1) * heads)
    keys, values = np.asarray(layer['keys'][mine]), np.asarray(layer['values'][mine])
    found.append({int(position[s]): (keys[:, :, s], values[:, s]) for s in held})
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['plain', next(name for name in OWN if 'mixture_of_depths' in name)]
)
def test_a_cache_is_the_same_after_tokens_are_taken_back(name, decoder_of):
  decoder = decoder_of(name)
  tokens = np.random.default_rng(4).integers(0, VOCAB, (BATCH, CONTEXT)).astype(np.int32)
  _, before, place_B = decoder.begin(list(tokens[:, :8]), TOGETHER)
  before = jax.device_get(before)
  at = after(place_B, TOGETHER)
  _, changed = step(decoder)(decoder.variables, before, tokens[:, 8:12], at)
  longer = jax.tree.map(np.asarray, changed)
  back = caches.truncated(changed, place_B)
  grew = 0
  for layer in before:
    own, other, more = (c[layer]['attention'] for c in (before, back, longer))
    assert_array_equal(own[LENGTH], other[LENGTH])
    grew += int(np.sum(more[LENGTH] - own[LENGTH]))
    for mine, theirs in zip(read(own, BATCH), read(other, BATCH)):
      assert mine.keys() == theirs.keys()
      jax.tree.map(assert_array_equal, mine, theirs)
  assert grew


def test_a_window_is_kept_whole_under_tokens_that_are_taken_back(decoder_of):
  """A cache for a token at a time has no room for the keys that several overwrite."""
  decoder = decoder_of('window 5')
  _, cache, place_B = decoder.begin([np.ones(7, np.int32)] * BATCH)
  count = cache['block_0']['attention'][POSITION].shape[1] - 5
  with pytest.raises(
    ValueError, match=f'{count + 1} tokens continue a sequence; .* at most {count}'
  ):
    at = after(place_B, count + 1)
    step(decoder)(decoder.variables, cache, np.ones_like(at), at)
  shape = decoder.cache(BATCH, count + 1)['block_0']['attention'][POSITION].shape
  assert shape == (BATCH, 32)
