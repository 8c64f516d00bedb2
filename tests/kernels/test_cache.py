"""Writing to and reading from caches, against NumPy indexing."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.kernels.cache import FEW, KEYS, LANES, VALUES, slots_for

B, G, K = 3, 2, 4


@pytest.mark.parametrize('tokens', [1, 5, 8])
@pytest.mark.parametrize('layout', [KEYS, VALUES])
def test_tokens_are_read_where_they_were_written(layout, tokens):
  assert B * 5 <= FEW < B * 8  # both ways to write several
  slots, draw = slots_for(20), np.random.default_rng(0)
  want = np.zeros((B, slots, G, K), np.float32)
  held = layout.empty(np.zeros((B, 1, G, K), np.float32), slots)
  for _ in range(4):
    new = draw.normal(size=(B, tokens, G, K)).astype(np.float32)
    slot = np.stack([draw.permutation(slots)[:tokens] for _ in range(B)])
    held = layout.write(held, new, slot)
    for b in range(B):
      want[b, slot[b]] = new[b]
    assert_array_equal(layout.read(held, B), want)
  assert np.count_nonzero(want) > B * tokens * G * K


def test_a_cache_has_a_spare_slot_and_a_multiple_of_the_lanes():
  assert [slots_for(size) for size in (1, LANES - 1, LANES, 100)] == [16, 16, 32, 112]
