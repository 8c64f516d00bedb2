"""Layers that a fixed share of the tokens enters, against loops over tokens in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from one_layer import (
  BATCH,
  LENGTH,
  REAL,
  SEEDS,
  VOCAB,
  WIDTH,
  applied,
  layer,
  numbers,
  plain_loop,
  sigmoid,
  small,
  unit,
)

from sparse_lm.core.errors import UserError
from sparse_lm.layers.tokens import Tokens
from sparse_lm.model import lm


def weights(params, x):
  return unit(x) @ params['depth']['router']['kernel'][:, 0].astype(np.float64)


def top(r_BxL, valid_BxL, seats):
  """bool: the valid tokens of each sequence with the largest weights, of equal ones the earlier."""
  enters = np.zeros(r_BxL.shape, bool)
  for b, r in enumerate(r_BxL):
    order = sorted(np.flatnonzero(valid_BxL[b]), key=lambda t: (-round(r[t], 4), t))
    enters[b, order[:seats]] = True
  return enters


def predicted(params, x):
  """The predictor's logits."""
  p = params['depth']['router_predictor']
  seen = np.concatenate([unit(x), weights(params, x)[..., None]], axis=-1)
  return seen @ p['kernel'][:, 0].astype(np.float64) + p['bias'][0]


def cross_entropy(logits, chosen):
  p = sigmoid(logits)
  return -np.mean(np.where(chosen, np.log(p), np.log(1 - p)))


def mixed(params, x, positions, enters):
  return x + weights(params, x)[..., None] * plain_loop(x, positions, enters)


def decided(r_BxL):
  return np.diff(np.sort(r_BxL, axis=-1)).min() > 1e-4


@given(SEEDS, st.integers(0, LENGTH - 4))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize(('capacity', 'seats'), [(0.125, 1), (0.45, 4), (1.0, 8)])
def test_training_equals_a_loop_over_the_tokens_that_the_router_likes_best(
  capacity, seats, seed, lost
):
  module = layer('mixture_of_depths', capacity=capacity)
  params, (x, positions, valid) = numbers(module, seed)
  valid = np.random.default_rng(seed).permuted(np.arange(LENGTH) >= np.full((2, 1), lost), axis=1)
  assume(decided(weights(params, x)))
  y, sown = applied(module, 'train')(params, x, positions, valid)
  enters = top(weights(params, x), valid, seats)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)
  assert_array_equal(np.any(y != x, axis=-1), enters)
  logits, enters = predicted(params, x)[valid], enters[valid]  # padding teaches nothing
  assert float(sown['losses']['depth']['predictor']) == pytest.approx(
    cross_entropy(logits, enters), rel=1e-4
  )
  accuracy = np.mean((logits > 0) == enters)
  assert float(sown['stats']['depth']['predictor_accuracy']) == pytest.approx(accuracy)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_of_equal_tokens_the_earlier_enters(seed):
  module = layer('mixture_of_depths', capacity=0.45)
  params, (x, positions, valid) = numbers(module, seed)
  # Three kinds of token, whose weights are those of one channel and so exactly equal.
  kinds = np.random.default_rng(seed).integers(0, 3, (BATCH, LENGTH))
  x, kernel = x[0, :3][kinds], np.zeros((WIDTH, 1), np.float32)
  kernel[0] = 2
  params['depth']['router']['kernel'] = kernel
  r = weights(params, x)
  assume(decided(weights(params, x[:1, np.unique(kinds[0], return_index=True)[1]])))
  enters = top(r, valid, 4)
  y, _ = applied(module, 'train')(params, x, positions, valid)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)


def test_with_capacity_for_all_every_token_enters_the_real_block():
  module = layer('mixture_of_depths', real=True, capacity=1.0)
  params, inputs = numbers(module, 0)
  added = REAL().apply({'params': params['block']}, Tokens(*inputs), 'train')
  want = inputs[0] + weights(params, inputs[0])[..., None] * added
  assert_allclose(applied(module, 'train')(params, *inputs)[0], want, rtol=1e-4, atol=1e-5)


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_in_the_real_block_tokens_keep_their_places_and_read_only_what_enters(seed):
  module = layer('mixture_of_depths', real=True, capacity=0.5)
  params, (x, positions, valid) = numbers(module, seed)
  r = weights(params, x)
  assume(decided(r))
  enters = top(r, valid, 4)
  # All tokens at their places, those that skip hidden from attention: nothing is gathered.
  added = masked_block(params['block'], x, positions, enters)
  want = x + np.where(enters[..., None], r[..., None] * added, 0)
  y, _ = applied(module, 'train')(params, x, positions, valid)
  assert_allclose(y, want, rtol=1e-3, atol=1e-4)
  moved = masked_block(params['block'], x, np.cumsum(enters, axis=1), enters)
  assert np.abs(moved - added)[enters].max() > 1e-3  # places are not what gathering would number


@jax.jit
def masked_block(params, x, positions, enters):
  return REAL().apply({'params': params}, Tokens(x, positions, enters), 'eval')


def test_gradients_reach_the_router_and_the_predictors_loss_trains_the_predictor_alone():
  module = layer('mixture_of_depths', capacity=0.45)
  params, (x, positions, valid) = numbers(module, 1)
  assert decided(weights(params, x))
  enters = top(weights(params, x), valid, 4)
  draw = np.random.default_rng(2)
  toward = jax.tree.map(lambda a: draw.standard_normal(a.shape), params)
  aside, target = draw.standard_normal((2, *x.shape))

  def output(params, x):
    return jnp.sum(applied(module, 'train')(params, x, positions, valid)[0] * target)

  def auxiliary(params, x):
    return applied(module, 'train')(params, x, positions, valid)[1]['losses']['depth']['predictor']

  def slope(gradient, *directions):
    return float(
      sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, directions)))
    )

  def difference(f):
    return (f(1e-6) - f(-1e-6)) / 2e-6

  moved = lambda step: jax.tree.map(lambda a, d: a + step * d, params, toward)  # noqa: E731
  by_hand = difference(
    lambda step: (mixed(moved(step), x + step * aside, positions, enters) * target).sum()
  )
  found = jax.jit(jax.grad(output, argnums=(0, 1)))(params, x)
  assert slope(found, toward, aside) == pytest.approx(by_hand, rel=1e-3)
  assert np.abs(found[0]['depth']['router']['kernel']).min() > 1e-3
  assert not np.any(found[0]['depth']['router_predictor']['kernel'])

  found = jax.jit(jax.grad(auxiliary, argnums=(0, 1)))(params, x)
  assert not np.any(found[1]) and not np.any(found[0]['depth']['router']['kernel'])

  def of_predictor(step):
    part = {'router_predictor': moved(step)['depth']['router_predictor']}
    return cross_entropy(predicted({'depth': params['depth'] | part}, x), enters)

  assert slope(found, toward, aside) == pytest.approx(difference(of_predictor), rel=1e-3)


@given(SEEDS)
@settings(deadline=None, max_examples=20)
def test_evaluation_follows_the_predictor(seed):
  module = layer('mixture_of_depths', capacity=0.125)
  params, (x, positions, valid) = numbers(module, seed)
  valid &= np.arange(LENGTH) != 2
  logits = predicted(params, x)
  assume(np.abs(logits).min() > 1e-4)
  enters = (logits > 0) & valid
  y, sown = applied(module, 'eval')(params, x, positions, valid)
  assert_allclose(y, mixed(params, x, positions, enters), rtol=1e-4, atol=1e-5)
  assert np.mean(sown['gates']['depth']['active']) == pytest.approx(enters.mean())
  assert 'losses' not in sown


@pytest.mark.parametrize('cut', [1, 4, 7])
def test_training_reads_later_tokens_and_evaluation_does_not(cut):
  module = layer('mixture_of_depths', real=True, capacity=0.25)
  params, (x, positions, valid) = numbers(module, 3)
  params['depth']['router_predictor']['bias'] += 3  # most tokens enter, so there is much to read
  other, favourite = x.copy(), params['depth']['router']['kernel'][:, 0]
  # Liked less than any before or more than any: those before them enter, or have no seat left.
  other[:, cut:] = -favourite
  x[:, cut:] = favourite
  for mode in lm.MODES:
    run = applied(module, mode)
    before, after = (np.asarray(run(params, v, positions, valid)[0]) for v in (x, other))
    earlier = np.abs(before - after)[:, :cut].max()
    assert earlier > 0.01 if mode == 'train' else earlier < 1e-6
    assert np.abs(before - after)[:, cut:].max() > 0.1
  model = lm.from_config(small(name='mixture_of_depths'), VOCAB)
  assert lm.causal(model) == {'train': False, 'eval': True}


@pytest.mark.parametrize('capacity', [0.0, 1 / 16, 0.06])
def test_capacities_without_a_token_are_refused(capacity):
  with pytest.raises(UserError) as refused:
    lm.from_config(small(name='mixture_of_depths', capacity=capacity), VOCAB)
  assert f'config.depth.capacity={capacity}' in str(refused.value)
  assert 'rounds to at least 1 of the 8 tokens' in str(refused.value) and '\n' not in str(
    refused.value
  )


def test_capacities_for_one_token_and_for_all_are_accepted():
  for capacity in (0.07, 0.125, 1.0):
    lm.from_config(small(name='mixture_of_depths', capacity=capacity), VOCAB)
