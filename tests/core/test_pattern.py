import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.core.pattern import kept, pattern


def count_for(size, density):
  """METHODS.md, convention 1."""
  return max(1, int(np.rint(size * density)))


@given(st.integers(1, 5000), st.integers(0, 64))
@settings(deadline=None, max_examples=60)
def test_kept_is_the_rounded_share_and_at_least_one(size, share):
  density = share / 64  # exact in float32
  assert int(kept(size, density)) == count_for(size, density)


@pytest.mark.parametrize('size', [2**23 - 1, 3_145_727, 999_983])
def test_kept_counts_large_leaves_to_the_weight(size):
  for count in (1, 2, size // 10, size // 3, size // 2, size - 1, size):
    assert int(kept(size, np.float32(count / size))) == count


@pytest.mark.parametrize('shape', [(30,), (5, 6), (3, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize('density', [0.0, 0.01, 0.25, 0.5, 1.0])
def test_every_trailing_matrix_keeps_its_largest_scores(shape, density):
  scores = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
  mask = np.asarray(jax.jit(pattern('unstructured'))(scores, density))
  assert mask.shape == shape and mask.dtype == bool
  count = count_for(30, density)
  for row, kept_row in zip(scores.reshape(-1, 30), mask.reshape(-1, 30)):
    assert set(np.flatnonzero(kept_row)) == set(np.argsort(-row)[:count])


def test_a_leading_axis_is_batch_even_where_one_slice_has_all_the_large_scores():
  scores = np.stack([np.full((4, 4), 9.0), np.full((4, 4), 0.1)]).astype(np.float32)
  assert pattern('unstructured')(scores, 0.25).sum(axis=(1, 2)).tolist() == [4, 4]


def test_one_executable_serves_every_density():
  traces = []

  def choose(scores, density):
    traces.append(1)
    return pattern('unstructured')(scores, density)

  choose = jax.jit(choose)
  scores = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
  counts = [int(choose(scores, np.float32(d)).sum()) for d in (0.125, 0.5, 0.75)]
  assert counts == [8, 32, 48] and len(traces) == 1


def test_an_unknown_pattern_is_refused_with_the_nearest_name():
  with pytest.raises(UserError, match=r"config\.weight\.pattern.*did you mean 'unstructured'"):
    pattern('unstructerd')
