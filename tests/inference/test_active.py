"""Active units are read in chunks, however many there are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.layers import chunks

UNITS = 100
ROWS = np.random.default_rng(0).normal(size=(UNITS, 5)).astype('f')


@functools.partial(jax.jit, static_argnums=1)
def summed(chosen, planned):
  def some(index, live):
    return jnp.sum(jnp.where(live[:, None], jnp.asarray(ROWS)[index], 0), axis=0)

  return chunks.in_chunks(chosen, planned, some)


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**31),
  share=st.sampled_from((0.0, 0.01, 0.3, 0.9, 1.0)),
  planned=st.sampled_from((0.001, 0.3, 1.0)),
)
def test_every_chosen_unit_counts_once_however_many_were_planned(seed, share, planned):
  chosen = np.random.default_rng(seed).random(UNITS) < share
  np.testing.assert_allclose(summed(chosen, planned), ROWS[chosen].sum(axis=0), atol=1e-5)
