"""One ranking over all matrices, of raw scores and with a least share of each, against stable sorts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from test_patterns import LEAVES, best, count_for

from sparse_lm.core.errors import UserError
from sparse_lm.patterns import pattern

FLOORS = {'a': 5, 'b': 2, 'c': 2}


@jax.jit
def floor_masks(scores, target):
  return pattern('global:raw:0.2').masks(scores, target)


@given(st.integers(0, 2**31), st.sampled_from([0.25, 0.35, 0.8, 1.0]))
@settings(deadline=None, max_examples=40)
def test_a_raw_ranking_with_a_floor_keeps_the_best_of_every_matrix_first(seed, share):
  draw = np.random.default_rng(seed)
  scores = {
    path: draw.permutation(math.prod(s)).reshape(s).astype('f') for path, s in LEAVES.items()
  }
  scores['a'] *= 100  # without a floor it would keep everything
  target = dict.fromkeys(LEAVES, np.float32(share))
  got = jax.device_get(floor_masks(scores, target))
  # A fifth: 4.8 of 24, 2.4 of each slice of 12, and 2 of 10.
  flat = {path: s.reshape(-1, math.prod(s.shape[-2:])) for path, s in scores.items()}
  want = {path: np.stack([best(one, FLOORS[path]) for one in f]) for path, f in flat.items()}
  ranked = np.concatenate([np.where(want[path], np.inf, flat[path]).ravel() for path in LEAVES])
  count = count_for(58, share)
  assert count >= 11  # what the floors keep
  assert_array_equal(np.concatenate([got[path].ravel() for path in LEAVES]), best(ranked, count))


def test_a_floor_regrows_no_dropped_weight():
  units = pattern('global:raw:0.5')
  like = {'a': np.zeros((2, 2), 'f'), 'b': np.zeros((2, 2), 'f')}
  scores = {'all': jnp.asarray([1, -np.inf, -np.inf, -np.inf, 5, 6, 7, 8], jnp.float32)}
  got = units.select(scores, {'all': jnp.float32(0.5)}, like)['all']
  assert_array_equal(got, [True, False, False, False, False, True, True, True])


def test_a_floor_above_the_kept_weights_is_refused_in_one_line():
  shapes = {'a': (10, 10), 'b': (2, 10, 10)}
  assert pattern('global:0.2').round_to_units(shapes, dict.fromkeys(shapes, 0.2))
  with pytest.raises(
    UserError, match=r'^config\.weight\.pattern.*0\.2 needs 60 .* leaves 30; valid'
  ):
    pattern('global:0.2').round_to_units(shapes, dict.fromkeys(shapes, 0.1))
