"""Every pattern against loops and stable sorts in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.core.units import kept_count
from sparse_lm.patterns import pattern, spellings

SHAPES = [(8, 6), (12, 4), (2, 8, 4), (2, 3, 4, 8)]
DENSITIES = st.sampled_from([0.0, 0.02, 0.25, 0.4, 0.5, 0.7, 1.0])
SEEDS = st.integers(0, 2**31)
LEVELS = st.sampled_from([1, 3, 10_000])  # how many values: few of them make ties
# Groups over one pair of matrices: 6 neurons, 3 heads of two columns, and two layers.
PAIR = {'up': (8, 6), 'down': (6, 4)}


def declared(neurons):
  """Groups over the pair `up` and `down`: neurons, three heads of as many neurons, and two layers."""
  members = (Member('up', -1), Member('down', -2))
  return (
    Group('neuron', 'mlp', neurons, members),
    Group('head', 'mlp', 3, members),
    Group('layer', '', 2, (Member('up', None, 0), Member('down', None, 1))),
  )


DECLARED = declared(6)
# A pair with several units of every spelling in sparse_lm/patterns/: each file there is tested.
LARGE = {'up': (32, 48), 'down': (48, 32)}
EVERY = pytest.mark.parametrize('name', spellings())
WIDER = [n for n in spellings() if (u := pattern(n, DECLARED)).spans_layers or u.spans_matrices]


def count_for(size, density):
  """METHODS.md, convention 1."""
  return max(1, int(np.rint(size * np.float32(density))))


def best(values, count):
  """The `count` largest, ties to the lower flat index."""
  mask = np.zeros(values.size, bool)
  mask[np.argsort(-values, axis=None, kind='stable')[:count]] = True
  return mask.reshape(values.shape)


def scores_of(shape, seed, levels):
  # Whole numbers: sums over units are exact, so that ties are ties in float32 too.
  return np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)


@functools.cache
def masks_of(name):
  """`(scores of one leaf, density) -> mask`; compiles once for each shape."""
  run = jax.jit(lambda scores, density: pattern(name).masks({'w': scores}, {'w': density})['w'])
  return lambda scores, density: np.asarray(run(scores, np.float32(density)))


def matrices(array):
  return array.reshape(-1, *array.shape[-2:])


CASES = [st.sampled_from(SHAPES), DENSITIES, SEEDS, LEVELS]


@given(st.integers(1, 5000), st.integers(0, 64))
@settings(deadline=None, max_examples=60)
def test_kept_is_the_rounded_share_and_at_least_one(size, share):
  density = share / 64  # exact in float32
  assert int(kept_count(size, density)) == count_for(size, density)


@pytest.mark.parametrize('size', [2**23 - 1, 3_145_727, 999_983])
def test_kept_counts_large_leaves_to_the_weight(size):
  for count in (1, 2, size // 10, size // 3, size // 2, size - 1, size):
    assert int(kept_count(size, np.float32(count / size))) == count


@pytest.mark.parametrize('name', ['unstructured', 'block:1'])
@given(*CASES)
@settings(deadline=None, max_examples=40)
def test_every_trailing_matrix_keeps_its_largest_scores(name, shape, density, seed, levels):
  scores = scores_of(shape, seed, levels)
  mask = masks_of(name)(scores, density)
  assert mask.shape == shape and mask.dtype == bool
  count = count_for(math.prod(shape[-2:]), density)
  for one, got in zip(matrices(scores), matrices(mask)):
    assert_array_equal(got, best(one, count))


@pytest.mark.parametrize('density', [0.0, 0.25, 0.5, 1.0])
def test_a_vector_counts_as_one_matrix(density):
  scores = scores_of((30,), 0, 10)
  assert_array_equal(
    masks_of('unstructured')(scores, density), best(scores, count_for(30, density))
  )


@pytest.mark.parametrize('name', [n for n in spellings() if n not in WIDER])
def test_a_leading_axis_is_batch_even_where_one_slice_has_all_the_large_scores(name):
  units = pattern(name, declared(48))
  scores = np.stack([np.full(LARGE['up'], 9.0), np.full(LARGE['up'], 0.1)]).astype(np.float32)
  mask = units.masks({'w': scores}, {'w': np.float32(0.5)})['w']
  assert mask.sum(axis=(1, 2)).tolist() == [768, 768]


@given(st.sampled_from(SHAPES), st.data(), SEEDS, LEVELS)
@settings(deadline=None, max_examples=60)
def test_per_output_keeps_the_best_inputs_of_every_output_as_many_of_each(
  shape, data, seed, levels
):
  fan_in = data.draw(st.integers(1, shape[-2]))
  scores = scores_of(shape, seed, levels)
  mask = masks_of('per_output')(scores, fan_in / shape[-2])
  for one, got in zip(matrices(scores), matrices(mask)):
    want = np.stack([best(column, fan_in) for column in one.T], axis=1)
    assert_array_equal(got, want)


@given(*CASES)
@settings(deadline=None, max_examples=40)
def test_per_output_fan_in_is_constant_and_the_nearest_whole_one(shape, density, seed, levels):
  mask = masks_of('per_output')(scores_of(shape, seed, levels), density)
  fan_in = set(mask.sum(axis=-2).ravel().tolist())
  assert len(fan_in) == 1
  # The matrix' count is rounded first, which is half a weight spread over its outputs.
  slack = 0.5 + 0.5 / shape[-1] + 1e-6
  assert abs(fan_in.pop() - max(1, shape[-2] * density)) <= slack


N_OF_M = st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (4, 4)])


@given(st.sampled_from(SHAPES), N_OF_M, SEEDS, LEVELS)
@settings(deadline=None, max_examples=60)
def test_n_of_m_keeps_the_n_best_of_every_group_of_inputs(shape, n_of_m, seed, levels):
  n, m = n_of_m
  scores = scores_of(shape, seed, levels)
  mask = masks_of(f'{n}:{m}')(scores, n / m)
  for one, got in zip(matrices(scores), matrices(mask)):
    for column in range(shape[-1]):
      for first in range(0, shape[-2], m):
        group = one[first : first + m, column]
        rank = np.argsort(np.argsort(-group, kind='stable'), kind='stable')
        chosen = got[first : first + m, column]
        assert chosen.sum() == n and rank[chosen].sum() == n * (n - 1) // 2
        assert_array_equal(chosen, best(group, n))


@given(st.sampled_from(SHAPES), st.integers(0, 40), SEEDS, LEVELS)
@settings(deadline=None, max_examples=60)
def test_n_of_m_keeps_more_of_each_group_while_a_ramp_is_denser(shape, share, seed, levels):
  density = 0.5 + share / 80
  assume(abs(density * 4 % 1 - 0.5) > 0.1)  # the matrix' count is rounded before the group's
  mask = masks_of('2:4')(scores_of(shape, seed, levels), density)
  groups = mask.reshape(*shape[:-2], -1, 4, shape[-1]).sum(axis=-2)
  assert set(groups.ravel().tolist()) == {round(density * 4)}


def tile_of(name, shape):
  if name == 'row':
    return 1, shape[-1]
  if name == 'column':
    return shape[-2], 1
  return (int(name.removeprefix('block:')),) * 2


def tile_means(matrix, rows, columns):
  return np.array(
    [
      [matrix[i : i + rows, j : j + columns].mean() for j in range(0, matrix.shape[1], columns)]
      for i in range(0, matrix.shape[0], rows)
    ],
    np.float32,
  )


@pytest.mark.parametrize('name', ['block:2', 'block:4', 'row', 'column'])
@given(*CASES)
@settings(deadline=None, max_examples=40)
def test_tiles_are_kept_whole_by_their_mean(name, shape, density, seed, levels):
  rows, columns = tile_of(name, shape)
  assume(shape[-1] % columns == 0)
  scores = scores_of(shape, seed, levels)
  mask = masks_of(name)(scores, density)
  pooled = matrices(np.asarray(pattern(name).pool({'w': jnp.asarray(scores)})['w']))
  for one, means, got in zip(matrices(scores), pooled, matrices(mask)):
    want = tile_means(one, rows, columns)
    assert_allclose(means, want, rtol=1e-6)
    chosen = best(want.astype(np.float64).round(4), count_for(want.size, density))
    assert_array_equal(got, np.kron(chosen, np.ones((rows, columns), bool)))


LEAVES = {'a': (4, 6), 'b': (2, 3, 4), 'c': (10,)}


@jax.jit
def global_masks(scores, target):
  return pattern('global').masks(scores, target)


def floats(target):
  return jax.tree.map(np.float32, target)


@given(SEEDS, st.sampled_from([0.0, 0.1, 0.35, 0.8, 1.0]), st.floats(0.01, 100))
@settings(deadline=None, max_examples=60)
def test_global_is_one_ranking_of_scores_over_their_leafs_norm(seed, share, factor):
  draw = np.random.default_rng(seed)
  scores = {path: np.abs(draw.normal(size=s)).astype('f') for path, s in LEAVES.items()}
  scores['a'] *= np.float32(factor)  # the norm takes out what a leaf's scale is
  target = {'a': share, 'b': share / 2, 'c': share}
  ranked = np.concatenate(
    [s.ravel() / np.linalg.norm(s.astype(np.float64)) for s in scores.values()]
  )
  count = count_for(58, (34 * share + 24 * share / 2) / 58)
  ordered = -np.sort(-ranked)
  assume(count == 58 or ordered[count - 1] - ordered[count] > 1e-6)
  got = jax.device_get(global_masks(scores, floats(target)))
  assert_array_equal(np.concatenate([got[path].ravel() for path in LEAVES]), best(ranked, count))
  assert {path: mask.shape for path, mask in got.items()} == LEAVES


def test_global_ties_go_to_the_earlier_leaf_and_zeros_come_last():
  scores = {'a': np.zeros((4, 6), 'f'), 'b': np.ones((2, 3, 4), 'f'), 'c': np.ones(10, 'f')}
  got = jax.device_get(global_masks(scores, floats(dict.fromkeys(LEAVES, 30 / 58))))
  assert got['c'].all() and not got['a'].any()  # 1 / sqrt(10) is above 1 / sqrt(24)
  assert_array_equal(got['b'].ravel(), np.arange(24) < 20)


@EVERY
def test_units_that_masks_keep_are_those_that_were_selected(name):
  units = pattern(name, declared(48))
  draw = np.random.default_rng(0)
  scores = {path: draw.random(shape).astype('f') for path, shape in LARGE.items()}
  pooled = jax.jit(units.pool)(scores)
  flags = {
    key: draw.permutation(array.size).reshape(array.shape) < (array.size + 1) // 2
    for key, array in pooled.items()
  }
  alive = units.alive(units.expand(flags, scores))
  for key, flag in flags.items():
    assert flag.any() and not flag.all()
    assert_array_equal(alive[key], flag)


@EVERY
def test_one_executable_serves_every_density(name):
  traces = []

  def choose(scores, density):
    traces.append(1)
    return pattern(name, declared(48)).masks(scores, dict.fromkeys(scores, density))

  choose = jax.jit(choose)
  draw = np.random.default_rng(0)
  scores = {path: draw.random(shape).astype('f') for path, shape in LARGE.items()}
  kept_weights = [
    sum(int(mask.sum()) for mask in choose(scores, np.float32(d)).values()) for d in (0.5, 0.75, 1)
  ]
  assert kept_weights[-1] == sum(score.size for score in scores.values())
  assert kept_weights[0] < kept_weights[-1] and len(traces) == 1


MISFITS = {
  'a tile that does not divide': ('block:4', {'w': (8, 6)}, ["'block:4'", 'w of 8 x 6', '2']),
  'a tile that divides the inputs alone': ('block:4', {'w': (3, 8, 9)}, ["'block:4'", '8 x 9']),
  'a group that does not divide': ('2:4', {'w': (6, 8)}, ["'2:4'", '6 inputs of w']),
  'one of several leaves': ('2:4', {'v': (8, 8), 'w': (3, 10, 8)}, ["'2:4'", '10 inputs of w']),
}


@pytest.mark.parametrize('case', MISFITS)
def test_shapes_that_do_not_fit_the_units_are_refused_in_one_line(case):
  name, shapes, words = MISFITS[case]
  with pytest.raises(UserError, match=r'^config\.weight\.pattern') as refused:
    pattern(name, DECLARED).check(shapes)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


REFUSED = {
  'another density than N of M': ('2:4', {'w': (8, 8)}, 0.25, ['0.75', 'sparsity=0.5', 'uniform']),
  'too few tiles': ('block:4', {'w': (8, 8)}, 0.3, ['4 units of w', '0.7', '0.5 or 0.75']),
  'too few rows': ('row', {'w': (4, 90)}, 0.4, ['4 units of w', '0.6', '0.5 or 0.75']),
  'too few heads': ('head', PAIR, 0.5, ['3 units of mlp/head', '0.5', '0.3333 or 0.6667']),
  'too few columns': ('column', {'w': (90, 4)}, 0.4, ['4 units of w', '0.6', '0.5 or 0.75']),
  'too few neurons': ('neuron', PAIR, 0.6, ['6 units of mlp/neuron', '0.4', '0.3333 or 0.5']),
  'less than one layer': ('layer', PAIR, 0.2, ['2 units', '0.8', '0.5']),
  'less than one input': ('per_output', {'w': (16, 90)}, 0.03, ['16 units of w', '0.97', '0.9375']),
  'too few inputs': ('per_output', {'w': (16, 90)}, 0.1, ['16 units of w', '0.875 or 0.9375']),
  'one of several leaves': ('row', {'v': (90, 4), 'w': (4, 90)}, 0.4, ['4 units of w']),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_sparsity_that_units_cannot_express_is_refused_in_one_line(case):
  name, shapes, density, words = REFUSED[case]
  units = pattern(name, DECLARED)
  units.check(shapes)
  with pytest.raises(UserError, match=r'^config\.weight\.pattern') as refused:
    units.round_to_units(shapes, dict.fromkeys(shapes, density))
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


@pytest.mark.parametrize(('name', 'shapes', 'density'), [
  ('block:4', {'w': (8, 8)}, 0.75), ('2:4', {'w': (8, 3)}, 0.5), ('row', {'w': (4, 90)}, 0.5),
  ('column', {'w': (90, 4)}, 0.25), ('head', PAIR, 1 / 3), ('layer', PAIR, 0.5),
  ('neuron', PAIR, 0.5), ('global', {'a': (3, 3), 'b': (5, 5)}, 0.41), ('unstructured', PAIR, 0.5),
])  # fmt: skip
def test_a_sparsity_that_units_can_express_is_accepted(name, shapes, density):
  units = pattern(name, DECLARED)
  units.check(shapes)
  found = units.round_to_units(shapes, dict.fromkeys(shapes, density))
  # All are whole counts, but of the weights of single matrices.
  whole = {'a': 4 / 9, 'b': 10 / 25} if name == 'global' else dict.fromkeys(shapes, density)
  assert found == pytest.approx(whole, rel=1e-12)


@EVERY
def test_density_one_is_expressed_by_every_pattern(name):
  units = pattern(name, declared(48))
  units.check(LARGE)
  assert units.round_to_units(LARGE, dict.fromkeys(LARGE, 1.0)) == dict.fromkeys(LARGE, 1.0)


@given(st.floats(0.001, 1))
@settings(deadline=None, max_examples=60)
def test_single_weights_are_rounded_and_never_refused(density):
  shapes = {'a': (2, 2), 'b': (5, 3, 7), 'c': (10,)}
  want = {path: max(1, round(n * density)) / n for path, n in {'a': 4, 'b': 21, 'c': 10}.items()}
  for name in ('unstructured', 'global'):
    assert pattern(name).round_to_units(shapes, dict.fromkeys(shapes, density)) == want


@pytest.mark.parametrize(('name', 'shape', 'count'), [
  ('block:4', (3, 20, 28), 35), ('row', (40, 4), 40), ('column', (4, 40), 40),
  ('per_output', (40, 4), 40),
])  # fmt: skip
@given(st.floats(0.001, 1))
@settings(deadline=None, max_examples=60)
def test_large_units_are_rounded_to_whole_counts_within_the_tolerance(name, shape, count, density):
  nearest = max(1, round(count * density)) / count
  assume(abs(abs(nearest - density) - 0.01) > 1e-9)
  rounded = functools.partial(pattern(name).round_to_units, {'w': shape}, {'w': density})
  if abs(nearest - density) < 0.01:
    assert rounded() == {'w': nearest}
  else:
    with pytest.raises(UserError, match=rf'^config\.weight\.pattern.*the {count} units of w'):
      rounded()


def test_members_of_a_group_get_the_mean_of_their_target_densities():
  group = Group('neuron', 'mlp', 100, (Member('up', -1), Member('down', -2), Member('gone', -1)))
  shapes = {'up': (8, 100), 'down': (100, 4)}
  found = pattern('neuron', (group,)).round_to_units(shapes, {'up': 0.5, 'down': 0.26})
  assert found == {'up': 0.42, 'down': 0.42}  # of 800 and 400 weights


def test_n_of_m_keeps_leaves_dense_that_are_asked_to_be():
  shapes = {'v': (8, 8), 'w': (4, 8)}
  assert pattern('2:4').round_to_units(shapes, {'v': 1.0, 'w': 0.5}) == {'v': 1.0, 'w': 0.5}


@pytest.mark.parametrize(('name', 'words'), [
  ('unstructerd', ["did you mean 'unstructured'"]),
  ('neurn', ["did you mean 'neuron'"]),
  ('5:4', ['1 <= N <= M']),
  ('0:4', ['1 <= N <= M']),
  ('block:0', ['block:16']),
  ('global:rew', ['global:raw:0.01']),
  ('global:1.5', ['global:raw:0.01']),
  ('global:0.0', ['global:raw:0.01']),
  ('block:-2', ["valid: 2:4, block:16, column"]),
])  # fmt: skip
def test_an_unknown_pattern_is_one_line_with_the_nearest_name(name, words):
  with pytest.raises(UserError, match=rf"config\.weight\.pattern '{name}'") as refused:
    pattern(name, DECLARED)
  assert '\n' not in str(refused.value)
  assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize('name', [group.kind for group in DECLARED])
def test_units_that_the_model_does_not_declare_are_refused(name):
  others = tuple(group for group in DECLARED if group.kind != name)
  with pytest.raises(
    UserError, match=rf"config\.weight\.pattern='{name}'.*has no units of this kind"
  ):
    pattern(name, others)
