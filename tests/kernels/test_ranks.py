"""Ranks of entries within their groups, against a loop."""

import collections

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sparse_lm.kernels import ranks

WAYS = {
  name: jax.jit(way, static_argnums=1)
  for name, way in vars(ranks).items()
  if name in ('ranks', 'by_sorting', 'by_counting')
}


@pytest.mark.parametrize('name', WAYS)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1), (300, 3), (256, 5), (128, 40)]))
@settings(deadline=None, max_examples=15)
def test_a_rank_is_the_number_of_earlier_entries_in_the_group(name, seed, case):
  entries, groups = case
  draw = np.random.default_rng(seed)
  group = draw.integers(0, draw.integers(1, groups + 1) + 1, entries).astype('i')
  rank, size = WAYS[name](group, groups)
  seen = collections.Counter()
  for own, found in zip(group, rank):
    assert own == groups or found == seen[own]
    seen[own] += 1
  assert_array_equal(size, [seen[own] for own in range(groups)])


def test_on_a_gpu_nothing_is_sorted_but_for_very_many_comparisons():
  def lowered(entries, groups):
    shape = jax.ShapeDtypeStruct((entries,), 'int32')
    traced = jax.jit(ranks.ranks, static_argnums=1).trace(shape, groups)
    return traced.lower(lowering_platforms=('cuda',)).as_text()

  assert 'stablehlo.sort' not in lowered(16384, 8)
  assert 'stablehlo.sort' in lowered(65536, 4096)
