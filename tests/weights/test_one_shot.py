"""SparseGPT on one matrix against Optimal Brain Surgeon, one weight at a time, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.patterns.n_of_m import NOfM
from sparse_lm.weights.one_shot import prune_by_obs

INPUTS, OUTPUTS = 12, 5
SIZE = INPUTS * OUTPUTS
SEEDS = st.integers(0, 2**31)
COUNTS = st.integers(1, SIZE)
EXACT = {'rtol': 0, 'atol': 1e-9}


def numbers(seed, dead=()):
  """Weights, and the Gram matrix of strongly correlated inputs."""
  draw = np.random.default_rng(seed)
  x = draw.standard_normal((40, INPUTS)) @ draw.normal(size=(INPUTS, INPUTS))
  x[:, list(dead)] = 0
  return draw.standard_normal((INPUTS, OUTPUTS)), x.T @ x / 40


def pruned(weights, gram, density, groups=None, damp=0.01, block=128):
  """`prune_by_obs` in float64; the density is float32, as a target is."""
  # jax 0.8 moved it; the older place is deprecated there.
  enable_x64 = jax.enable_x64 if hasattr(jax, 'enable_x64') else jax.experimental.enable_x64
  with enable_x64(True):
    new, mask = prune_by_obs(
      jnp.asarray(weights), jnp.asarray(gram), jnp.float32(density), groups, damp, block
    )
    assert new.dtype == jnp.float64
    return np.asarray(new), np.asarray(mask)


def damped(gram, damp=0.01):
  h = gram.copy()
  dead = np.diagonal(gram) == 0
  h[dead, dead] = 1
  return h + damp * np.diagonal(h).mean() * np.eye(len(h))


def largest(scores, count):
  """The `count` largest, and whether float32 rounding cannot change which they are."""
  order = np.argsort(-scores, axis=None, kind='stable')
  mask = np.zeros(scores.size, bool)
  mask[order[:count]] = True
  ranked = scores.ravel()[order]
  clear = count in (0, scores.size) or ranked[count] < ranked[count - 1] * (1 - 1e-5)
  return mask.reshape(scores.shape), clear


def surgeon(weights, gram, choose, damp, block):
  """Weights, mask, the sum of what each weight costs as it is dropped, and whether no choice was close.

  Before each input the inverse of the Hessian over the inputs that are still free is taken anew.
  """
  w, h = weights.copy(), damped(gram, damp)
  w[np.diagonal(gram) == 0] = 0
  inverses = [np.linalg.inv(h[j:, j:]) for j in range(len(h))]
  pivots = np.array([inverse[0, 0] for inverse in inverses])
  mask, cost, clear = np.zeros(w.shape, bool), 0.0, True
  for j in range(len(h)):
    if j % block == 0:
      here = slice(j, j + block)
      mask[here], unmistakable = choose(w[here] ** 2 / pivots[here, None], j)
      clear &= unmistakable
    dropped = np.where(mask[j], 0, w[j])
    cost += (dropped**2 / pivots[j]).sum() / 2
    w[j:] -= inverses[j][:, :1] / pivots[j] * dropped
  return np.where(mask, w, 0), mask, cost, clear


def shares(density):
  """Each block keeps its part of the whole count."""

  def choose(scores, begin):
    before, after = (round(n * OUTPUTS * density) for n in (begin, begin + len(scores)))
    return largest(scores, after - before)

  return choose


def grouped(n):
  def choose(scores, _):
    columns = [largest(column, n) for column in scores.T]
    return np.stack([mask for mask, _ in columns], axis=1), all(clear for _, clear in columns)

  return choose


def quadratic(change, h):
  return np.trace(change.T @ h @ change) / 2


def refitted(weights, mask, h):
  """Least squares on the support, output by output, from the normal equations."""
  out = np.zeros_like(weights)
  for o, kept in enumerate(mask.T):
    if kept.any():
      out[kept, o] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ weights[:, o])
  return out


@pytest.mark.parametrize('damp', [0.01, 0.3])
@pytest.mark.parametrize('block', [4, 5, 128])
@given(SEEDS, COUNTS)
@settings(deadline=None, max_examples=15)
def test_it_is_optimal_brain_surgery_with_masks_chosen_block_by_block(block, damp, seed, count):
  weights, gram = numbers(seed)
  density = np.float32(count / SIZE)
  want, mask, cost, clear = surgeon(weights, gram, shares(density), damp, block)
  assume(clear)
  new, kept = pruned(weights, gram, density, damp=damp, block=block)
  assert_array_equal(kept, mask)
  assert_allclose(new, want, **EXACT)
  assert kept.sum() == count
  assert_allclose(quadratic(new - weights, damped(gram, damp)), cost, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(('n', 'm'), [(2, 4), (1, 3), (5, 6)])
@given(SEEDS)
@settings(deadline=None, max_examples=10)
def test_n_of_m_is_optimal_brain_surgery_whatever_the_block(n, m, seed):
  weights, gram = numbers(seed)
  want, mask, cost, clear = surgeon(weights, gram, grouped(n), 0.01, m)
  assume(clear)
  for block in (1, 7, 128):
    new, kept = pruned(weights, gram, n / m, NOfM(n, m), block=block)
    assert_array_equal(kept, mask)
    assert (kept.reshape(-1, m, OUTPUTS).sum(axis=1) == n).all()
    assert_allclose(new, want, **EXACT)
    assert_allclose(quadratic(new - weights, damped(gram)), cost, rtol=1e-9)


@given(SEEDS, st.lists(st.integers(0, INPUTS - 1), min_size=OUTPUTS, max_size=OUTPUTS))
@settings(deadline=None, max_examples=25)
def test_dropping_the_first_inputs_is_least_squares_on_the_rest(seed, first):
  weights, gram = numbers(seed)
  # Each output has its own number of first inputs, with weights that no score can rescue.
  small = np.arange(INPUTS)[:, None] < np.array(first)
  weights = np.where(small, 1e-3, np.sign(weights) * (0.5 + np.abs(weights)))
  new, kept = pruned(weights, gram, (~small).mean())
  assert_array_equal(kept, ~small)
  assert_allclose(new, refitted(weights, ~small, damped(gram)), **EXACT)
  assert not small.any() or np.abs((new - weights)[~small]).max() > 1e-6


@given(SEEDS, st.floats(0.2, 0.9), st.sampled_from([4, 128]))
@settings(deadline=None, max_examples=25)
def test_refitting_on_the_same_support_is_never_worse(seed, density, block):
  weights, gram = numbers(seed)
  h = damped(gram)
  new, kept = pruned(weights, gram, density, block=block)
  assert not new[~kept].any()
  best, got = (quadratic(w - weights, h) for w in (refitted(weights, kept, h), new))
  assert best <= got + 1e-9


def test_corrections_reduce_the_error_if_inputs_are_correlated():
  costs = []
  for seed in range(20):
    weights, _ = numbers(seed)
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((40, 1)) + 0.3 * draw.standard_normal((40, INPUTS))
    gram = x.T @ x / 40
    h = damped(gram)
    new, kept = pruned(weights, gram, 0.5)
    wanda = np.abs(weights) * np.sqrt(np.diagonal(gram))[:, None]
    masks = kept, largest(wanda, SIZE // 2)[0], largest(np.abs(weights), SIZE // 2)[0]
    alone = [quadratic(np.where(mask, weights, 0) - weights, h) for mask in masks]
    costs.append([quadratic(new - weights, h), *alone])
  ours, *others = np.mean(costs, axis=0)
  assert ours < 0.5 * min(others)


@given(SEEDS, COUNTS, st.sets(st.integers(0, INPUTS - 1), min_size=1, max_size=INPUTS))
@settings(deadline=None, max_examples=25)
def test_inputs_that_are_always_zero_lose_their_weights_and_move_no_other(seed, count, dead):
  weights, gram = numbers(seed, dead)
  dead = sorted(dead)
  for groups, choose, block in (
    (None, shares(np.float32(count / SIZE)), 5),
    (NOfM(2, 4), grouped(2), 4),
  ):
    new, kept = pruned(weights, gram, 0.5 if groups else count / SIZE, groups, block=block)
    assert np.isfinite(new).all() and not new[dead].any()
    assert kept.sum() == (SIZE // 2 if groups else count)
    want, *_ = surgeon(weights, gram, choose, 0.01, block)
    # Which of the equal zeros are kept is a tie; what is kept of the others is none.
    assert_allclose(new, want, **EXACT)


def test_the_scale_of_the_inputs_and_its_mean_or_sum_do_not_matter():
  weights, gram = numbers(0)
  want = pruned(weights, gram, 0.4)
  for scale in (1e-6, 40, 1e6):
    new, kept = pruned(weights, scale * gram, 0.4)
    assert_array_equal(kept, want[1])
    assert_allclose(new, want[0], rtol=1e-9)


def test_uncorrelated_inputs_are_pruned_by_weight_times_norm_and_nothing_moves():
  weights, _ = numbers(1)
  squares = np.random.default_rng(2).uniform(0.1, 4, INPUTS)
  new, kept = pruned(weights, np.diag(squares), 0.3, damp=1e-9)
  mask, clear = largest(np.abs(weights) * np.sqrt(squares)[:, None], round(0.3 * SIZE))
  assert clear
  assert_array_equal(kept, mask)
  assert_allclose(new, np.where(mask, weights, 0), **EXACT)


def test_weights_keep_their_dtype_and_float32_is_enough():
  weights, gram = numbers(3)
  exact, _ = pruned(weights, gram, 0.5)
  for dtype, near in ((jnp.float32, 1e-3), (jnp.bfloat16, 2e-2)):
    stored = jnp.asarray(weights, dtype)
    new, kept = prune_by_obs(stored, jnp.asarray(gram, jnp.float32), jnp.float32(0.5))
    assert new.dtype == dtype and int(kept.sum()) == SIZE // 2
    assert_allclose(np.asarray(new, np.float64), exact, atol=near * np.abs(exact).max())


def test_a_density_of_one_prunes_nothing_with_groups():
  weights, gram = numbers(3)
  new, kept = pruned(weights, gram, 1.0, NOfM(2, 4))
  assert kept.all()
  assert_allclose(new, weights, rtol=1e-6, atol=1e-6)


def test_a_block_of_inputs_that_none_divides_still_gives_the_exact_count():
  draw = np.random.default_rng(4)
  x = draw.standard_normal((300, 131)).astype(np.float32)
  weights = jnp.asarray(draw.standard_normal((131, 7)), jnp.float32)
  for count in (1, 2, 130, 458, 916, 917):
    new, kept = prune_by_obs(weights, x.T @ x, jnp.float32(count / 917))
    assert int(kept.sum()) == count
    assert not np.asarray(new)[~np.asarray(kept)].any()
  assert_array_equal(new, weights)  # at density 1
