"""Wanda against its definition in NumPy, and what all one-shot methods do to a tree of leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.patterns.n_of_m import NOfM
from sparse_lm.weights.one_shot import prune_by_obs

WANDA, SPARSEGPT, ALPS = (slots.method('weight', name) for name in ('wanda', 'sparsegpt', 'alps'))
INPUTS, OUTPUTS = 12, 6
SEEDS = st.integers(0, 2**31)
STEP, KEY = jnp.int32(0), jax.random.key(0)


def numbers(seed):
  """Weights and the inputs that they read, of very different norms."""
  draw = np.random.default_rng(seed)
  x = draw.standard_normal((30, INPUTS)) * draw.uniform(0.1, 3, INPUTS)
  return draw.standard_normal((INPUTS, OUTPUTS)).astype(np.float32), x.astype(np.float32)


def signals(x):
  return {'x_sq': np.mean(np.square(x), axis=0), 'xtx': x.T @ x / len(x)}


@functools.cache
def updated(method):
  """`(weights, signals, density) -> (new weights, mask)` of one leaf."""

  @jax.jit
  def run(weights, found, density):
    trainable, sparse = method.init(KEY, {'w': weights}, {'w': density})
    given = {need: {'w': found[need]} for need in method.traits.needs}
    change = method.update(trainable, sparse, given, STEP, KEY)
    return change.trainable['params']['w'], change.sparse.masks['w']

  return lambda *a: [np.asarray(out) for out in run(*a)]


def scores(weights, x):
  """Equation 1: the magnitude times the norm of the input over all tokens."""
  return np.abs(weights) * np.linalg.norm(x.astype(np.float64), axis=0)[:, None]


def largest(values, count):
  """The `count` largest of a vector; none where rounding could change which."""
  order = np.argsort(-values)
  assume(count == len(values) or values[order[count]] < values[order[count - 1]] * (1 - 1e-5))
  return np.isin(np.arange(len(values)), order[:count])


@given(SEEDS, st.integers(1, INPUTS))
@settings(deadline=None, max_examples=30)
def test_wanda_keeps_the_largest_weight_times_norm_of_each_output(seed, fan_in):
  weights, x = numbers(seed)
  want = np.stack([largest(column, fan_in) for column in scores(weights, x).T], axis=1)
  new, mask = updated(WANDA(total_steps=1))(weights, signals(x), np.float32(fan_in / INPUTS))
  assert_array_equal(mask, want)
  assert_array_equal(new, np.where(want, weights, 0))  # what is kept is the same to the bit


def in_groups(values):
  groups = values.T.reshape(-1, 4)
  return np.stack([largest(group, 2) for group in groups]).reshape(OUTPUTS, INPUTS).T


def all_together(values):
  return largest(values.ravel(), values.size // 2).reshape(values.shape)


def in_tiles(rows, columns, values):
  """Half the tiles by their mean."""
  shape = INPUTS // rows, rows, OUTPUTS // columns, columns
  mean = values.reshape(shape).mean(axis=(1, 3))
  return np.kron(
    largest(mean.ravel(), mean.size // 2).reshape(mean.shape), np.ones((rows, columns))
  )


PATTERNS = {
  '2:4': in_groups,
  'unstructured': all_together,
  'block:2': functools.partial(in_tiles, 2, 2),
  'row': functools.partial(in_tiles, 1, OUTPUTS),
  'column': functools.partial(in_tiles, INPUTS, 1),
}


@pytest.mark.parametrize('pattern', PATTERNS)
@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_other_patterns_keep_the_units_of_the_largest_mean_score(pattern, seed):
  weights, x = numbers(seed)
  want = PATTERNS[pattern](scores(weights, x)).astype(bool)
  new, mask = updated(WANDA(total_steps=1, pattern=pattern))(weights, signals(x), np.float32(0.5))
  assert_array_equal(mask, want)
  assert_array_equal(new, np.where(want, weights, 0))


def test_the_norm_of_the_inputs_decides_and_not_the_magnitude_alone():
  weights = np.array([[3.0, -0.1], [-1.0, 0.2]], np.float32)
  found = {'x_sq': np.array([0.01, 4.0], np.float32)}
  _, mask = updated(WANDA(total_steps=1))(weights, found, np.float32(0.5))
  assert mask.tolist() == [[False, False], [True, True]]
  _, mask = updated(WANDA(total_steps=1, pattern='unstructured'))(weights, found, np.float32(0.25))
  assert mask.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
  'method',
  [
    SPARSEGPT(total_steps=1),
    SPARSEGPT(total_steps=1, damp=0.5, block=4),
    SPARSEGPT(total_steps=1, pattern='2:4', block=4),
  ],
  ids=str,
)
def test_sparsegpt_hands_its_fields_to_the_matrix_routine(method):
  weights, x = numbers(5)
  groups = NOfM(2, 4) if method.pattern == '2:4' else None
  want = prune_by_obs(
    weights, signals(x)['xtx'], np.float32(0.5), groups, method.damp, method.block
  )
  new, mask = updated(method)(weights, signals(x), np.float32(0.5))
  assert_array_equal(mask, want[1])
  np.testing.assert_allclose(new, want[0], rtol=1e-5, atol=1e-6)
  assert mask.sum() == weights.size // 2
  # It makes up for what it drops, and each field matters.
  assert np.abs((new - weights)[mask]).max() > 1e-3
  default, _ = updated(SPARSEGPT(total_steps=1))(weights, signals(x), np.float32(0.5))
  assert method == SPARSEGPT(total_steps=1) or np.abs(new - default).max() > 1e-3


@pytest.mark.parametrize('cls', [WANDA, SPARSEGPT, ALPS])
def test_an_update_changes_the_leaves_that_have_signals_and_no_other(cls):
  method = cls(total_steps=1)
  draws = [numbers(seed) for seed in range(3)]
  params = {name: jnp.asarray(w) for name, (w, _) in zip('abc', draws)} | {'scale': jnp.ones(4)}
  target = {'a': jnp.float32(0.5), 'b': jnp.float32(0.25), 'c': jnp.float32(0.5), 'scale': None}
  trainable, sparse = method.init(KEY, params, target)
  assert all(sparse.masks[name].all() for name in 'abc') and sparse.masks['scale'] is None
  seen = [
    {
      need: dict.fromkeys(params) | {name: signals(draws[i][1])[need]}
      for need in method.traits.needs
    }
    for i, name in enumerate('ab')
  ]
  first = method.update(trainable, sparse, seen[0], STEP, KEY)
  second = method.update(first.trainable, first.sparse, seen[1], STEP, KEY)
  assert trainable['params'] == params and sparse.masks['a'].all()  # pure
  counts = [[int(change.sparse.masks[name].sum()) for name in 'abc'] for change in (first, second)]
  assert counts == [[36, 72, 72], [36, 18, 72]]
  for change, name in ((first, 'a'), (second, 'b')):
    assert [n for n in 'abc' if change.toggled[n].any()] == [name]
    assert_array_equal(change.toggled[name], ~change.sparse.masks[name])
    assert change.sparse.target == target and change.toggled['scale'] is None
  new = second.trainable['params']
  assert_array_equal(new['a'], first.trainable['params']['a'])
  for name in ('c', 'scale'):
    assert_array_equal(new[name], params[name])
  for i, name in enumerate('ab'):
    alone = updated(method)(*[draws[i][0], signals(draws[i][1]), target[name]])
    assert_array_equal(second.sparse.masks[name], alone[1])
    np.testing.assert_allclose(new[name], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('pattern', ['per_output', 'block:4', 'row', 'column'])
def test_patterns_that_sparsegpt_has_no_rule_for_are_refused_and_wanda_takes_them(pattern):
  with pytest.raises(UserError) as refused:
    SPARSEGPT(total_steps=1, pattern=pattern).check()
  line = str(refused.value)
  assert f"config.weight.pattern='{pattern}'" in line and 'single weights' in line and 'N:M' in line
  assert '\n' not in line
  WANDA(total_steps=1, pattern=pattern).check()


def test_sparsegpts_own_patterns_and_the_ends_of_its_ranges_are_accepted():
  for fields in ({}, {'pattern': '2:4'}, {'pattern': '1:8'}, {'block': 1}, {'damp': 1e-9}):
    SPARSEGPT(total_steps=1, **fields).check()
