"""Sampling: which tokens can be drawn, and how often."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sparse_lm.core.errors import UserError
from sparse_lm.inference.sample import Sampling

VOCAB = 9


def allowed(logits, top_k, top_p):
  """One row, by a loop: tokens in order of likelihood until enough of them hold `top_p`."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
  weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
  kept, held = set(), 0.0
  for token, probability in zip(order, weights / weights.sum()):
    if held >= top_p:
      break
    kept.add(token)
    held += probability
  return kept


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  top_k=st.integers(0, VOCAB),
  top_p=st.sampled_from((0.05, 0.3, 0.5, 0.9, 1.0)),
)
def test_the_filters_keep_what_a_loop_keeps(seed, top_k, top_p):
  logits = np.random.default_rng(seed).integers(-3, 4, (3, VOCAB)).astype('f')  # with ties
  found = np.asarray(Sampling(top_k=top_k, top_p=top_p).filtered(logits))
  for row, kept in zip(logits, found > -np.inf):
    wanted = allowed(row.tolist(), top_k, top_p)
    # Sums of equal probabilities may round to either side of top_p.
    assert abs(len(wanted) - kept.sum()) <= (top_p < 1)
    assert set(np.flatnonzero(kept)) <= wanted or wanted <= set(np.flatnonzero(kept))
  assert_allclose(found[found > -np.inf], logits[found > -np.inf])


def test_greedy_takes_the_lower_of_equal_tokens():
  logits = np.array([[0.0, 2.0, 2.0], [5.0, 1.0, 1.0]], np.float32)
  assert Sampling(temperature=0).draw(logits, jax.random.key(0)).tolist() == [1, 0]


def test_draws_are_as_frequent_as_the_tempered_probabilities():
  logits = np.array([0.0, 1.0, -1.0, 0.5], np.float32)
  sampling = Sampling(temperature=0.7, top_k=3)
  drawn = np.asarray(sampling.draw(np.tile(logits, (20000, 1)), jax.random.key(0)))
  weights = np.exp(logits / 0.7) * [1, 1, 0, 1]
  assert_allclose(np.bincount(drawn, minlength=4) / 20000, weights / weights.sum(), atol=0.015)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [
    ({'temperature': -1.0}, '--temperature=-1.0'),
    ({'temperature': float('nan')}, '--temperature=nan'),
    ({'top_k': 10}, '--top_k=10'),
    ({'top_k': -1}, '--top_k=-1'),
    ({'top_p': 0.0}, '--top_p=0.0'),
    ({'top_p': 1.5}, '--top_p=1.5'),
  ],
)
def test_an_option_out_of_range_is_named(fields, named):
  with pytest.raises(UserError, match=named):
    Sampling(**fields).check(VOCAB)
