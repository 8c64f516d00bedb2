import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.kernels.topk import top, topk_mask, true_indices

SHAPES = [(1,), (7,), (32,), (5, 8), (1, 9), (9, 1), (2, 3, 4)]
# Few values, so that most selections have to break ties; the ends of float32 are among them.
VALUES = [-np.inf, -3e38, -2.0, -1.0, -1e-30, 0.0, 1e-30, 0.5, 0.5000001, 1.0, 3e38, np.inf]
JITTED = jax.jit(topk_mask)
BATCHED = jax.jit(jax.vmap(topk_mask))


def oracle(scores, k):
  """Stable sort of the negated scores: the largest first, ties in flat order."""
  order = np.argsort(-np.asarray(scores).ravel(), kind='stable')
  mask = np.zeros(order.size, bool)
  mask[order[:k]] = True
  return mask.reshape(np.shape(scores))


@st.composite
def selections(draw):
  shape = draw(st.sampled_from(SHAPES))
  size = math.prod(shape)
  values = draw(st.lists(st.sampled_from(VALUES), min_size=size, max_size=size))
  return np.array(values, np.float32).reshape(shape), draw(st.integers(0, size))


@given(selections())
@settings(deadline=None, max_examples=150)
def test_equals_stable_argsort_under_ties(selection):
  scores, k = selection
  # The jitted function takes k as an argument, hence traced.
  np.testing.assert_array_equal(JITTED(scores, k), oracle(scores, k))


@given(selections(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_equals_stable_argsort_on_distinct_values(selection, seed):
  scores, k = selection
  scores = np.random.default_rng(seed).standard_normal(scores.shape).astype(np.float32)
  np.testing.assert_array_equal(JITTED(scores, k), oracle(scores, k))


def test_ties_go_to_the_lower_flat_index():
  assert topk_mask(jnp.zeros((2, 3)), 4).tolist() == [[True] * 3, [True, False, False]]


def test_zeros_of_both_signs_are_equal():
  scores = np.array([-0.0, 0.0, -0.0, 0.0], np.float32)
  for function in (topk_mask, JITTED):
    assert function(scores, 1).tolist() == [True, False, False, False]
    assert function(scores[1:], 2).tolist() == [True, True, False]


def test_negative_values_and_minus_infinity_rank_below_the_rest():
  scores = np.array([-np.inf, -5.0, -1.0, -np.inf, -3.0], np.float32)
  assert topk_mask(scores, 2).tolist() == [False, False, True, False, True]
  assert topk_mask(scores, 4).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize('shape', SHAPES)
def test_no_and_all_entries(shape):
  for scores in (np.zeros(shape, np.float32), np.full(shape, -np.inf), np.full(shape, np.inf)):
    assert not JITTED(scores, 0).any()
    assert JITTED(scores, math.prod(shape)).all()


def test_python_k_without_jit_equals_traced_k():
  scores = np.random.default_rng(0).integers(-3, 3, (6, 7)).astype(np.float32)
  for k in (0, 1, 20, 42):
    np.testing.assert_array_equal(topk_mask(scores, k), JITTED(scores, k))


@given(st.integers(0, 2**31), st.lists(st.integers(0, 12), min_size=5, max_size=5))
@settings(deadline=None, max_examples=40)
def test_vmap_takes_a_count_for_each_slice(seed, counts):
  scores = np.random.default_rng(seed).integers(-2, 3, (5, 3, 4)).astype(np.float32)
  masks = BATCHED(scores, np.array(counts))
  for mask, s, k in zip(masks, scores, counts):
    np.testing.assert_array_equal(mask, oracle(s, k))


def test_bfloat16_scores_rank_as_their_values():
  scores = jnp.array([1.0, -2.0, 1.0078125, 0.0], jnp.bfloat16)
  assert topk_mask(scores, 2).tolist() == [True, False, True, False]


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9])
def test_a_large_matrix_with_heavy_ties(share):
  rng = np.random.default_rng(1)
  # Adding zero leaves no -0.0, which has a test of its own.
  scores = (np.round(rng.standard_normal((768, 3072)), 1) + 0.0).astype(np.float32)
  k = round(scores.size * share)
  np.testing.assert_array_equal(JITTED(scores, k), oracle(scores, k))


def test_the_best_of_each_row_in_order():
  scores = np.random.default_rng(2).integers(0, 4, (5, 9)).astype(np.float32)  # with ties
  values, index = top(scores, 4)
  order = np.argsort(-scores, axis=1, kind='stable')[:, :4]
  np.testing.assert_array_equal(index, order)
  np.testing.assert_array_equal(values, np.take_along_axis(scores, order, axis=1))


@settings(max_examples=30, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  size=st.sampled_from((5, 64, 200)),
  share=st.floats(0, 1),
  first=st.integers(0, 70),
)
def test_true_indices_lists_the_true_entries_of_a_mask(seed, size, share, first):
  mask = np.random.default_rng(seed).random(size) < share
  found = np.asarray(true_indices(mask, size, first))
  held = np.flatnonzero(mask)[first:]
  assert found[: len(held)].tolist() == held.tolist()
  assert ((found >= 0) & (found < size)).all()
