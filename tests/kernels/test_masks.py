"""Masks and attention against loops over queries and keys in NumPy."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.kernels.attention import (
  Blocks,
  Documents,
  KeyValues,
  Mask,
  attention,
  computed_keys,
  mask_array,
)
from sparse_lm.plan import executed

B, L, S, H, G, K = 2, 5, 9, 4, 2, 3
SEEDS = st.integers(0, 2**31)
STATIC = [
  {},
  {'causal': False},
  {'window': 1},
  {'window': 3},
  {'window': 3, 'causal': False},
  {'window': 2, 'sinks': 2},
  {'window': 2, 'sinks': 1, 'causal': False},
]


def drawn(seed):
  """Queries and keys of any positions, of which some keys may not be read; documents and blocks."""
  draw = np.random.default_rng(seed)
  keys = KeyValues(
    draw.normal(size=(B, S, G, K)).astype('f'),
    draw.normal(size=(B, S, G, K)).astype('f'),
    np.stack([draw.permutation(S + 2)[:S] for _ in range(B)]).astype('i'),
    draw.random((B, S)) < 0.8,
  )
  q = draw.normal(size=(B, L, H, K)).astype('f')
  positions = draw.integers(0, S + 2, (B, L)).astype('i')
  documents = Documents(draw.integers(0, 2, (B, L)), draw.integers(0, 2, (B, S)))
  of_keys = draw.integers(0, 4, (B, S), np.int32)
  blocks = Blocks(draw.random((B, G, H // G, L, 4)) < 0.5, 3, of_keys=of_keys)
  return q, positions, keys, documents, blocks


def by_head(read):
  """`[B, G or 1, H / G or 1, ...]` as `[B, H, ...]`: heads of one key head follow each other."""
  return np.broadcast_to(read, (B, G, H // G, *read.shape[3:])).reshape(B, H, *read.shape[3:])


def reads_by_loop(mask, positions, keys):
  """bool `[B, H, L, S]`, an entry at a time."""
  reads = np.zeros((B, H, L, S), bool)
  of_heads = None if mask.blocks is None else by_head(mask.blocks.read)
  for b, h, l in np.ndindex(B, H, L):
    for s in range(S):
      query, key = positions[b, l], keys.positions[b, s]
      near = mask.window is None or abs(query - key) < mask.window or key < mask.sinks
      reads[b, h, l, s] = keys.valid[b, s] and near and not (mask.causal and key > query)
      if mask.documents is not None:
        reads[b, h, l, s] &= mask.documents.of_queries[b, l] == mask.documents.of_keys[b, s]
      if mask.blocks is not None:
        given = mask.blocks.of_keys
        block = key // mask.blocks.size if given is None else given[b, s]
        reads[b, h, l, s] &= of_heads[b, h, l, block]
    if not reads[b, h, l].any():
      reads[b, h, l] = keys.positions[b] == positions[b, l]
  return reads


@given(SEEDS, st.sampled_from(STATIC), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_mask_reads_what_its_parts_all_allow(seed, static, documents, blocks):
  _, positions, keys, of_documents, of_blocks = drawn(seed)
  # Blocks of positions too; and what is the same for all heads, or for those of one key head.
  groups, heads = (slice(1 if seed % n else None) for n in (2, 3))
  of_keys = of_blocks.of_keys if seed % 5 else None
  of_blocks = of_blocks.replace(read=of_blocks.read[:, groups, heads], of_keys=of_keys)
  given_parts = {'documents': of_documents} if documents else {}
  given_parts |= {'blocks': of_blocks} if blocks else {}
  mask = Mask(**static, **given_parts)
  found = by_head(np.asarray(mask_array(mask, positions, keys)))
  assert_array_equal(found, reads_by_loop(mask, positions, keys))


@pytest.mark.parametrize('static', STATIC)
def test_the_count_of_keys_is_that_of_the_mask(static):
  mask, places = Mask(**static), np.arange(S, dtype='i')[None]
  keys = KeyValues(None, None, places, np.ones((1, S), bool))
  reads = np.asarray(mask_array(mask, places, keys)).reshape(S, S)
  assert [mask.count(place, S) for place in range(S)] == reads.sum(-1).tolist()


@pytest.mark.parametrize('most', [1, 2, 3, 9])
@pytest.mark.parametrize('static', STATIC)
def test_the_count_of_keys_is_that_of_the_best_blocks_and_the_own_one(static, most):
  size = 4  # does not divide S
  mask, places = Mask(**static), np.arange(S, dtype='i')[None]
  reads = mask_array(mask, places, KeyValues(None, None, places, np.ones((1, S), bool)))
  # How many keys of each block a query may read.
  of_blocks = np.add.reduceat(np.asarray(reads).reshape(S, S), range(0, S, size), axis=1)
  mask = mask.replace(blocks=Blocks(None, size, max_blocks=most))
  for place in range(S):
    own = of_blocks[place, place // size]
    others = np.sort(np.delete(of_blocks[place], place // size))[::-1]
    found, best = mask.count(place, S), own + others[: most - 1].sum()
    assert best <= found <= min(of_blocks[place].sum(), own + (most - 1) * size)
    assert found == best or 'window' in static


def attention_by_loop(q, keys, reads):
  """One query at a time, float64; a head reads the key head of its group."""
  out = np.zeros((B, q.shape[1], H, K))
  for b, l, h in np.ndindex(B, q.shape[1], H):
    g = h // (H // G)
    read = np.flatnonzero(reads[b, h, l]) if reads[b, h, l].any() else np.arange(S)
    k, v = (a[b, read, g].astype(np.float64) for a in (keys.k, keys.v))
    scores = k @ q[b, l, h] / K**0.5 if reads[b, h, l].any() else np.zeros(S)
    weights = np.exp(scores - scores.max())
    out[b, l, h] = weights / weights.sum() @ v
  return out


@functools.cache
def compiled(static):
  """Of several queries, with documents and blocks."""

  def run(q, positions, keys, documents, blocks):
    mask = Mask(**dict(static), documents=documents, blocks=blocks)
    return attention(q, positions, keys, mask)

  return jax.jit(run)


@given(SEEDS, st.sampled_from([{}, {'window': 3, 'sinks': 1}]), st.sampled_from([1, L]))
@settings(deadline=None, max_examples=40)
def test_attention_equals_a_loop_over_queries_and_heads(seed, static, queries):
  q, positions, keys, documents, blocks = drawn(seed)
  mask = Mask(**static, documents=documents, blocks=blocks)
  reads = reads_by_loop(mask, positions, keys)[:, :, :queries]
  q, positions = q[:, :queries], positions[:, :queries]
  documents = documents.replace(of_queries=documents.of_queries[:, :queries])
  blocks = blocks.replace(read=blocks.read[..., :queries, :])
  found = compiled(tuple(static.items()))(q, positions, keys, documents, blocks)
  assert_allclose(found, attention_by_loop(q, keys, reads), atol=1e-5)


@pytest.mark.parametrize('queries', [1, L])
@pytest.mark.parametrize('most', [None, 2, S, S + 1])
def test_the_keys_that_are_computed_are_those_of_the_traced_program(queries, most):
  q, positions, keys, *_ = drawn(0)
  select = None if most is None else lambda scores, reads: reads & (scores > 0)
  jaxpr = jax.make_jaxpr(
    lambda q, positions: attention(q, positions, keys, Mask(), None, select, most)
  )(q[:, :queries], positions[:, :queries])
  flops = 2 * B * queries * H * K * computed_keys(queries, S, most)
  assert executed.count(jaxpr.jaxpr).flops == flops


def test_on_weights_is_applied_to_the_weights_of_every_query():
  q, positions, keys, *_ = drawn(1)
  for queries in (1, L):
    given_queries = q[:, :queries], positions[:, :queries]
    plain = attention(*given_queries, keys, Mask())
    doubled = attention(*given_queries, keys, Mask(), on_weights=lambda weights: 2 * weights)
    assert_allclose(doubled, 2 * plain, rtol=1e-6)


def test_visibly_incomplete_sequences_cannot_be_declared_whole():
  *_, keys, _, _ = drawn(0)
  places = {'positions': np.stack([np.arange(S)] * B), 'valid': np.ones((B, S), bool)}
  assert keys.replace(**places, whole=True).whole
  with pytest.raises(ValueError, match='whole sequences'):
    keys.replace(valid=places['valid'], whole=True)
  with pytest.raises(ValueError, match='whole sequences'):
    keys.replace(positions=places['positions'], whole=True)
