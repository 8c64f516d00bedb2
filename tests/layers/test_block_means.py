"""Cached means of blocks of keys, against means of the keys themselves."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from numpy.testing import assert_allclose

from sparse_lm.layers.cache import LENGTH, extend, truncated
from sparse_lm.layers.tokens import Tokens

B, G, K, SIZE, CONTEXT, TOGETHER = 2, 2, 3, 4, 16, 3


class Layer(nn.Module):
  @nn.compact
  def __call__(self, k, valid, positions, continues):
    tokens = Tokens(k, positions, valid, continues=continues)
    return extend(self, CONTEXT, tokens, k, k, block=SIZE)


@functools.partial(jax.jit, static_argnums=4)
def apply(cache, k, valid, positions, continues):
  keys, changed = Layer().apply({'cache': cache}, k, valid, positions, continues, mutable='cache')
  return keys.means, keys.cached, changed['cache']


class Text:
  """What a cache is given, and in lists what it should hold: the valid tokens of each sequence."""

  def __init__(self, seed):
    self.draw = np.random.default_rng(seed)
    k = np.zeros((B, TOGETHER, G, K), 'f')
    ones = np.ones((B, TOGETHER), bool)
    shapes = jax.eval_shape(Layer().init, jax.random.key(0), k, ones, 0 * ones, True)
    self.cache = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes['cache'])
    self.held, self.place = [[] for _ in range(B)], 0

  def add(self, tokens, valid, continues=True):
    """The means that go with new tokens, or `None`."""
    k = self.draw.normal(size=(B, tokens, G, K)).astype('f')
    valid = np.broadcast_to(valid, (B, tokens))
    positions = np.broadcast_to(np.arange(tokens) + self.place, (B, tokens))
    for b, t in zip(*np.nonzero(valid)):
      self.held[b].append((positions[b, t], k[b, t]))
    means, _, self.cache = apply(self.cache, k, valid, positions, continues)
    self.place += tokens
    return means

  def take_back(self, place):
    self.cache, self.place = truncated(self.cache, np.full(B, place)), place
    self.held = [[(at, k) for at, k in row if at < place] for row in self.held]

  def check(self, means):
    """Of every block that is full."""
    checked = 0
    for b, row in enumerate(self.held):
      assert self.cache[LENGTH][b] == len(row)
      for n in range(len(row) // SIZE):
        want = np.mean([k for _, k in row[n * SIZE : (n + 1) * SIZE]], axis=0)
        assert_allclose(means[b, n], want, rtol=1e-5, atol=1e-6)
        checked += 1
    return checked


def test_the_mean_of_each_full_block_is_that_of_its_keys_also_where_tokens_are_skipped():
  text = Text(0)
  valid = np.arange(6) < np.array([6, 3])[:, None]  # unequal prompts
  assert text.add(6, valid, continues=False) is None  # they read each other
  checked = []
  for step in range(8):
    skips = np.array([step % 3 == 0, step % 4 == 1])
    checked.append(text.check(text.add(1, ~skips[:, None])))
  assert checked[0] == 2 and checked[-1] == 4


@pytest.mark.parametrize('tokens', [1, TOGETHER])
def test_means_are_right_after_tokens_were_taken_back(tokens):
  text = Text(1)
  text.add(6, True, continues=False)
  for place in (5, 7, 8):  # within a block, one token short of its end, and at its end
    while text.place < 10:
      means = text.add(tokens, True)
    assert text.check(means) >= 2 * B
    text.take_back(place)
  while text.place < 12:
    means = text.add(1, True)
  assert text.check(means) == 3 * B
