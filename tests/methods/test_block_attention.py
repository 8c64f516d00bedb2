"""Mixture of block attention against dense attention under a mask that loops make in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from test_attention_methods import (
  HEADS,
  KEYS,
  SEEDS,
  WIDTH,
  applied,
  arrays_of,
  mask_of,
  masked_attention,
  method,
  model_of,
)

from sparse_lm.core.errors import UserError
from sparse_lm.kernels import blocks
from sparse_lm.kernels.attention import KeyValues
from sparse_lm.kernels.topk import top, topk_rows
from sparse_lm.model import lm, plans
from sparse_lm.plan import cost

PATH = 'block_0/attention/attention'
# Key heads, keys of a block, blocks that a query reads: few, for each is compiled.
SIZES = st.sampled_from([(1, 2, 2), (2, 1, 3), (4, 3, 1)])


def blocks_of(arrays, i):
  """The valid keys of a sequence in order, cut into blocks; `size` of them in all but the last one."""
  *_, key_positions, valid = arrays
  keys = sorted(np.flatnonzero(valid[i]), key=lambda j: key_positions[i, j])
  return lambda size: [keys[n : n + size] for n in range(0, len(keys), size)]


def block_mask(arrays, size, most):
  """bool `[B, H, L, S]`, a query of a head at a time; and the least gap at which a choice is made."""
  _, q, k, _, positions, key_positions, _ = arrays
  mask, gap = np.zeros((len(q), HEADS, q.shape[1], k.shape[1]), bool), np.inf
  for i, head, t in np.ndindex(mask.shape[:3]):
    cut = blocks_of(arrays, i)(size)
    before = [j for j in itertools.chain(*cut) if key_positions[i, j] <= positions[i, t]]
    if not before:
      mask[i, head, t] = key_positions[i] == positions[i, t]
      continue
    own = next(n for n, block in enumerate(cut) if before[-1] in block)
    group = head // (HEADS // k.shape[2])
    score = [
      q[i, t, head].astype(float) @ k[i, cut[n], group].astype(float).mean(0) for n in range(own)
    ]
    order = sorted(range(own), key=lambda n: (-score[n], n))
    if most - 1 < own and most > 1:
      gap = min(gap, score[order[most - 2]] - score[order[most - 1]])
    for n in [own, *order[: most - 1]]:
      mask[i, head, t, [j for j in cut[n] if j in before]] = True
  return mask, gap


@given(SEEDS, SIZES, st.booleans())
@settings(deadline=None, max_examples=40)
def test_queries_read_their_own_block_and_the_best_of_those_before_it(seed, sizes, whole):
  groups, size, k = sizes
  arrays = arrays_of(seed, groups, whole=whole)
  mask, gap = block_mask(arrays, size, k)
  assume(gap > 1e-5 or (whole and gap == 0))  # of equal blocks the earlier
  y, _ = applied(method('moba', block=size, k=k))({}, *arrays)
  assert_allclose(y, masked_attention(arrays, mask), atol=1e-5)


def test_the_cases_cover_equal_blocks_and_heads_that_choose_differently():
  ties = [block_mask(arrays_of(seed, 1, whole=True), 2, 2)[1] == 0 for seed in range(20)]
  masks = [block_mask(arrays_of(seed, 1), 2, 2)[0] for seed in range(20)]
  assert any(ties) and any((mask != mask[:, :1]).any() for mask in masks)


@pytest.mark.parametrize(('size', 'k'), [(KEYS, 1), (4, 2), (1, KEYS)])
def test_blocks_that_cover_every_key_recover_full_attention(size, k):
  arrays = arrays_of(0, 2)
  full, _ = applied(method('full'))({}, *arrays)
  y, _ = applied(method('moba', block=size, k=k))({}, *arrays)
  assert_allclose(y, full, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_dense_attention_under_the_mask():
  arrays = arrays_of(5, 2)
  mask, gap = block_mask(arrays, 2, 2)
  assert gap > 1e-3 and (mask_of(arrays)[0] & ~mask).any()
  target = np.random.default_rng(6).normal(size=arrays[1].shape)
  run = applied(method('moba', block=2, k=2))

  def dense(q, k, v):
    k, v = (jnp.repeat(a, HEADS // 2, axis=2) for a in (k, v))
    scores = jnp.einsum('blhk,bshk->bhls', q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.sum(jnp.einsum('bhls,bshk->blhk', weights, v) * target)

  def chosen(q, k, v):
    return jnp.sum(run({}, arrays[0], q, k, v, *arrays[4:])[0] * target)

  wanted, found = (jax.grad(f, argnums=(0, 1, 2))(*arrays[1:4]) for f in (dense, chosen))
  for want, got in zip(wanted, found):
    assert np.abs(want).max() > 0.1
    assert_allclose(got, want, atol=1e-5)


def test_padding_without_any_key_has_finite_outputs_and_gradients():
  arrays = arrays_of(1, 4)
  arrays[-1][0] = False
  run = applied(method('moba', block=2, k=2))
  y, _ = run({}, *arrays)
  loss = lambda *floats: jnp.sum(jnp.square(run({}, *floats, *arrays[4:])[0]))  # noqa: E731
  grads = jax.grad(loss, argnums=(1, 2, 3))(*arrays[:4])
  assert np.isfinite(y).all() and all(np.isfinite(g).all() for g in grads)


B, S, G, H, K, SIZE = 2, 16, 2, 4, 3, 4


@pytest.mark.parametrize('whole', [False, True])
def test_one_query_that_reads_chosen_blocks_of_a_cache_equals_all_of_it_under_a_mask(whole):
  draw = np.random.default_rng(2)
  number = (lambda *s: draw.integers(-1, 2, s)) if whole else (lambda *s: draw.normal(size=s))
  q, k, v = (number(B, n, h, K).astype('f') for n, h in ((1, H), (S, G), (S, G)))
  count = np.array([S - 2, 5])  # the second sequence has fewer blocks than are asked for
  valid = np.arange(S) < count[:, None]
  keys = KeyValues(k, v, np.broadcast_to(np.arange(S), (B, S)), valid)
  own = blocks.key_ranks(count[:, None] - 1, keys) // SIZE
  assert_array_equal(own[:, 0], (count - 1) // SIZE)
  scores = blocks.block_scores(q, blocks.means(keys, SIZE), own)
  index = top(scores, 3)[1].reshape(B, H, 3)
  y = blocks.attend_to_blocks(q, keys, index, SIZE, lambda weights: 2 * weights)
  # The choice of one query is the one that many queries make.
  by_mask = topk_rows(scores, 3) & (scores > -np.inf)
  for b, h in np.ndindex(B, H):
    there = [n for n in np.asarray(index[b, h]) if n * SIZE < count[b]]
    chosen = np.flatnonzero(by_mask[b, h // 2, h % 2, 0])
    assert sorted(there) == chosen.tolist() and own[b, 0] in chosen
    at = [s for n in chosen for s in range(n * SIZE, (n + 1) * SIZE) if s < count[b]]
    weights = np.exp(k[b, at, h // 2] @ q[b, 0, h] / K**0.5)
    assert_allclose(y[b, 0, h], 2 * weights / weights.sum() @ v[b, at, h // 2], atol=1e-5)


@pytest.mark.parametrize('length', [1, 3, 5, 8])
def test_the_ledger_counts_the_entries_of_the_mask(length):
  rng, where = np.random.default_rng(4), np.arange(length)[None]
  q, k = rng.normal(size=(1, length, HEADS, 4)), rng.normal(size=(1, length, 2, 4))
  arrays = (None, q, k, None, where, where, np.ones((1, length), bool))
  mask, _ = block_mask(arrays, 2, 2)
  notes = plans.ledger(model_of({'name': 'moba', 'block': 2, 'k': 2}), length)
  exact = cost.causal_pairs(notes)
  for kind in ('scores', 'values'):
    assert exact[f'{PATH}/{kind}'].flops == pytest.approx(2 * 4 * mask.sum() / length)
  # Every query scores all blocks, of which those before its own are charged.
  past = sum(place // 2 for place in range(length))
  assert exact[f'{PATH}/choice'].flops == pytest.approx(2 * WIDTH * past / length)
  assert notes[f'{PATH}/choice'].flops == 2 * WIDTH * -(-length // 2)
  assert (mask.sum() < mask_of(arrays)[0].sum()) == (length > 4)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'block': 3},
      'config.attention.block=3 is not valid; valid: a divisor of config.data.context, 8',
    ),
    ({'block': 2, 'k': 5}, 'config.attention.k=5 is not valid; valid: 1 to 4, the blocks of 2 in'),
    ({'block': 2, 'k': 0}, 'config.attention.k=0 is not valid; valid: a whole number in [1, 2^31)'),
    ({'block': 0}, 'config.attention.block=0 is not valid; valid: a whole number in [1, 2^31)'),
  ],
)
def test_blocks_that_do_not_fit_the_context_are_refused_in_one_line(fields, message, tiny_config):
  given_fields = {f'attention.{field}': value for field, value in fields.items()}
  with pytest.raises(UserError) as refused:
    config = {'data.context': 8, 'attention.name': 'moba', **given_fields}
    lm.from_config(tiny_config(**config), vocab=11)
  assert str(refused.value).startswith(message) and '\n' not in str(refused.value)
