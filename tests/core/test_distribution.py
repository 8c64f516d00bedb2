import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from sparse_lm.core import distribution
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.core.units import kept_count
from sparse_lm.patterns import pattern

SHAPES = st.lists(
  st.one_of(
    st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    st.tuples(st.integers(1, 8), st.integers(1, 300), st.integers(1, 300)),
  ),
  min_size=1,
  max_size=8,
).map(lambda shapes: {f'leaf_{i}': shape for i, shape in enumerate(shapes)})
SPARSITY = st.floats(0.01, 0.99)
UNSTRUCTURED = pattern('unstructured')


def expressible(tree, sparsity, name, units):
  """Target densities; examples that whole units cannot represent are rejected."""
  try:
    return distribution.targets(tree, sparsity, name, (), units)
  except UserError:
    assume(False)


def er_by_bisection(shapes, density):
  """Densities min(1, eps (in + out) / (in out)) whose weighted sum is the target's, by root finding."""
  sizes = np.array([math.prod(s) for s in shapes.values()], float)
  raw = np.array([(s[-2] + s[-1]) / (s[-2] * s[-1]) for s in shapes.values()])

  def excess(log_epsilon):
    return np.minimum(1, np.exp(log_epsilon) * raw) @ sizes - density * sizes.sum()

  return np.minimum(1, np.exp(brentq(excess, -60, 60, xtol=1e-14)) * raw)


@pytest.mark.parametrize('name', ['er', 'erk'])
@given(shapes=SHAPES, sparsity=SPARSITY)
@settings(deadline=None, max_examples=100)
def test_erdos_renyi_equals_bisection_with_clipping(name, shapes, sparsity):
  solved = distribution.unrounded_densities(shapes, sparsity, name)
  expected = er_by_bisection(shapes, 1 - sparsity)
  np.testing.assert_allclose([solved[path] for path in shapes], expected, rtol=1e-9)


@pytest.mark.parametrize('name', ['uniform', 'er'])
@given(shapes=SHAPES, sparsity=SPARSITY)
@settings(deadline=None, max_examples=40)
def test_totals_are_met_within_one_weight_a_matrix(name, shapes, sparsity):
  params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
  wanted = (1 - sparsity) * sum(math.prod(shape) for shape in shapes.values())
  matrices = sum(math.prod(shape[:-2]) for shape in shapes.values())
  try:
    targets = distribution.targets(params, sparsity, name, (), UNSTRUCTURED)
  except UserError:
    assert matrices > 0.1 * wanted  # a weight a matrix is more than a tenth of all that is kept
    return
  total = sum(float(targets[path]) * math.prod(shape) for path, shape in shapes.items())
  assert abs(total - wanted) <= matrices + 1e-3


@pytest.mark.parametrize('name', ['uniform', 'er', 'erk'])
def test_no_sparsity_is_density_one_everywhere(name):
  solved = distribution.unrounded_densities({'a': (10, 20), 'b': (300, 5), 'c': (7, 7)}, 0.0, name)
  assert list(solved.values()) == pytest.approx([1, 1, 1])


def test_uniform_gives_every_leaf_the_target():
  assert distribution.unrounded_densities({'a': (3, 4), 'b': (500, 2)}, 0.75, 'uniform') == {
    'a': 0.25,
    'b': 0.25,
  }


def test_erk_density_of_a_transformer():
  """METHODS.md 2.1: six layers of width 384 at 90 % give attention .133 and MLP .083."""
  shapes = {}
  for layer in range(6):
    shapes |= {f'{layer}/{name}': (384, 384) for name in ('query', 'key', 'value', 'out')}
    shapes |= {f'{layer}/up': (384, 1536), f'{layer}/down': (1536, 384)}
  solved = distribution.unrounded_densities(shapes, 0.9, 'erk')
  assert round(solved['0/query'], 3) == 0.133 and round(solved['5/down'], 3) == 0.083


def test_a_map_takes_the_first_match_and_the_rest_the_target():
  shapes = {'attention/query': (4, 4), 'attention/out': (4, 4), 'mlp/up': (4, 8), 'gate': (2, 2)}
  solved = distribution.unrounded_densities(shapes, 0.5, 'query=0.25, attention=0.75,^gate$=0')
  expected = {'attention/query': 0.75, 'attention/out': 0.25, 'mlp/up': 0.5, 'gate': 1.0}
  assert solved == pytest.approx(expected)


@pytest.mark.parametrize('sparsity, name, words', [
  (0.5, 'unifrom', ['config.weight.distribution', "'unifrom'", "did you mean 'uniform'?", 'erk']),
  (0.5, 'mlp=1.0', ['config.weight.distribution', "'mlp=1.0'", '[0, 1)']),
  (0.5, 'mlp=high', ["'mlp=high'", 'number']),
  (0.5, 'attn=0.5', ["'attn=0.5'", 'matches no prunable', 'mlp/up']),
  (0.5, 'mlp=0.5,', ['config.weight.distribution']),
])  # fmt: skip
def test_a_bad_distribution_is_one_line_that_says_what_is_valid(sparsity, name, words):
  with pytest.raises(UserError) as error:
    distribution.unrounded_densities({'mlp/up': (4, 8)}, sparsity, name)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


def params():
  shape = jax.ShapeDtypeStruct
  return {
    'embed': {'tokens': shape((65, 32), jnp.float32)},
    'block': {'up': {'kernel': shape((32, 100), jnp.float32), 'bias': shape((100,), jnp.float32)}},
    'experts': {'kernel': shape((3, 7, 11), jnp.float32)},
    'norm': {'scale': shape((32,), jnp.float32)},
  }


def test_targets_are_none_exactly_in_the_dense_scope():
  targets = distribution.targets(params(), 0.9, 'uniform', ('embed', 'norm', 'bias'), UNSTRUCTURED)
  assert targets['embed'] == {'tokens': None} and targets['norm'] == {'scale': None}
  assert targets['block']['up']['bias'] is None
  assert targets['block']['up']['kernel'].dtype == jnp.float32
  assert float(targets['block']['up']['kernel']) == pytest.approx(0.1, rel=1e-6)


def test_sparsity_is_over_the_prunable_leaves_only():
  targets = distribution.targets(params(), 0.5, 'er', ('embed', 'norm', 'bias'), UNSTRUCTURED)
  left = float(targets['block']['up']['kernel']) * 3200 + float(targets['experts']['kernel']) * 231
  assert left == pytest.approx(0.5 * 3431, abs=4)


def test_a_leaf_that_reaches_density_one_still_has_a_target():
  targets = distribution.targets(
    {'a': jnp.ones((2, 2)), 'b': jnp.ones((500, 500))}, 0.5, 'er', (), UNSTRUCTURED
  )
  assert float(targets['a']) == 1.0


def test_nothing_to_prune_is_refused():
  with pytest.raises(UserError, match=r'^config\.weight\.dense='):
    distribution.targets(params(), 0.5, 'uniform', ('.',), UNSTRUCTURED)


@given(st.integers(1, 1800), st.integers(1, 1800), SPARSITY)
@settings(deadline=None, max_examples=60)
def test_the_float32_density_gives_the_exact_count_back(rows, columns, sparsity):
  target = expressible({'w': np.zeros((rows, columns))}, sparsity, 'uniform', UNSTRUCTURED)['w']
  # Half a weight is where NumPy and a decimal calculation may round apart.
  exact = rows * columns * (1 - sparsity)
  count = int(kept_count(rows * columns, target))
  assert count == max(1, round(exact)) or (abs(exact % 1 - 0.5) < 1e-6 and abs(count - exact) < 1)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 40), SPARSITY)
@settings(deadline=None, max_examples=40)
def test_an_expert_axis_keeps_a_whole_count_for_each_expert(experts, rows, columns, sparsity):
  shape = (experts, rows, columns)
  target = expressible({'w': np.zeros(shape)}, sparsity, 'uniform', UNSTRUCTURED)['w']
  count = float(target) * rows * columns
  assert count == pytest.approx(round(count), abs=1e-3) and round(count) >= 1
  assert abs(count - (1 - sparsity) * rows * columns) <= 1


def test_leaves_without_units_stay_dense():
  tree = {'a': jnp.ones((4, 8)), 'b': jnp.ones((8, 4)), 'c': jnp.ones((4, 4)), 'd': jnp.ones(8)}
  group = Group('neuron', 'mlp', 8, (Member('a', -1), Member('b', -2)))
  targets = distribution.targets(tree, 0.25, 'uniform', (), pattern('neuron', (group,)))
  assert targets == {'a': 0.75, 'b': 0.75, 'c': None, 'd': None}
  targets = distribution.targets(tree, 0.25, 'uniform', ('b',), pattern('row'))
  assert targets == {'a': 0.75, 'b': None, 'c': 0.75, 'd': None}
  with pytest.raises(UserError, match=r'there is nothing to prune'):
    distribution.targets({'d': jnp.ones(8)}, 0.25, 'uniform', (), pattern('row'))


WHOLE = {'up': (64, 96), 'down': (96, 64), 'experts': (3, 64, 64)}
NEURONS = (Group('neuron', 'mlp', 96, (Member('up', -1), Member('down', -2))),)


@functools.cache
def masks_of(name):
  return jax.jit(pattern(name, NEURONS).masks)


@pytest.mark.parametrize(
  'name', ['block:4', 'block:8', 'row', 'column', 'per_output', 'neuron', 'unstructured']
)
@given(st.floats(0, 0.99), st.sampled_from(['uniform', 'er', 'down=0.5']))
@settings(deadline=None, max_examples=20)
def test_a_target_is_exactly_the_share_that_its_masks_keep(name, sparsity, share):
  tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in WHOLE.items()}
  targets = expressible(tree, sparsity, share, pattern(name, NEURONS))
  assert [path for path in targets if targets[path] is None] == ['experts'] * (name == 'neuron')
  targets = {path: target for path, target in targets.items() if target is not None}
  draw = np.random.default_rng(0)
  scores = {path: draw.random(WHOLE[path]).astype('f') for path in targets}
  for path, mask in masks_of(name)(scores, targets).items():
    count = int(mask.sum())
    assert targets[path] == np.float32(count / mask.size)
    assert float(targets[path]) * mask.size == pytest.approx(count, rel=1e-6)


@pytest.mark.parametrize('sparsity, name', [(0.0, 'uniform'), (0.0, 'b=0.5'), (0.5, 'uniform')])
def test_units_that_do_not_fit_are_refused_at_any_sparsity_and_budget(sparsity, name):
  tree = {'a': jnp.ones((4, 8)), 'b': jnp.ones((6, 8))}
  with pytest.raises(UserError, match=r"^config\.weight\.pattern '2:4'.*6 inputs of b"):
    distribution.targets(tree, sparsity, name, (), pattern('2:4'))
  with pytest.raises(UserError, match=r"^config\.weight\.pattern='block:4'.*b of 6 x 8"):
    distribution.targets(tree, sparsity, name, (), pattern('block:4'))
  # What is declared dense need not fit.
  found = distribution.targets(tree, sparsity, name.replace('b', 'a'), ('b',), pattern('2:4'))
  assert found == {'a': 0.5 if sparsity or '=' in name else 1.0, 'b': None}


def test_densities_that_the_units_cannot_express_are_refused():
  tree = {'a': jnp.ones((4, 8)), 'b': jnp.ones((8, 40))}
  with pytest.raises(
    UserError, match=r'^config\.weight\.pattern.*4 units of a.*0\.4; valid: 0\.25 or'
  ):
    distribution.targets(tree, 0.4, 'uniform', (), pattern('row'))
  with pytest.raises(UserError, match=r"^config\.weight\.pattern '2:4'.*b.*distribution='uniform'"):
    distribution.targets(tree, 0.5, 'a=0.5,b=0.6', (), pattern('2:4'))


@pytest.mark.parametrize('name', ['uniform', 'erk', 'a=0.999999,b=0.5'])
def test_a_sparsity_that_needs_fractions_of_weights_is_refused_and_a_valid_one_suggested(name):
  """Matrices of 1024 and 2048 weights keep at least one each: 2 of 3072, a sparsity of 0.99935."""
  params = {'a': jax.ShapeDtypeStruct((32, 32), jnp.float32)}
  params |= {'b': jax.ShapeDtypeStruct((32, 64), jnp.float32)}
  with pytest.raises(UserError, match=r'a sparsity of 0\.9999\d* becomes') as refused:
    distribution.targets(params, 0.99999, name, (), UNSTRUCTURED)
  said = re.search(r'becomes ([\d.]+); valid: for example ([\d.]+)$', str(refused.value))
  got, near = map(float, said.groups())
  assert got == pytest.approx(1 - (1 / 1024 if '=' in name else 2 / 3072), abs=1e-9)
  named = name.replace('0.999999', str(near))
  targets = distribution.targets(params, near, named, (), UNSTRUCTURED)
  sizes = {'a': 1024, 'b': 2048} if '=' not in name else {'a': 1024}
  kept_share = sum(float(targets[path]) * size for path, size in sizes.items()) / sum(
    sizes.values()
  )
  assert kept_share == pytest.approx(1 - near, rel=0.1)


OUTLIERS = st.lists(
  st.tuples(st.floats(0, 0.2), st.integers(1, 10**6)), min_size=1, max_size=12
).map(lambda pairs: {f'block_{i}': pair for i, pair in enumerate(pairs)})


@given(OUTLIERS, st.floats(0.3, 0.7), st.floats(0.01, 0.14))
@settings(deadline=None, max_examples=100)
def test_owl_keeps_the_mean_and_gives_more_outliers_more_weights(found, density, spread):
  shares = {name: share for name, (share, _) in found.items()}
  sizes = {name: size for name, (_, size) in found.items()}
  solved = distribution.Outliers(5, spread).densities(shares, sizes, density)
  got = np.array(list(solved.values()))
  np.testing.assert_allclose(np.average(got, weights=list(sizes.values())), density, rtol=1e-9)
  assert all(np.diff(got[np.argsort(list(shares.values()))]) >= -1e-12)
  spans = len({*shares.values()}) > 1
  assert np.ptp(got) == pytest.approx(2 * spread if spans else 0, rel=1e-6, abs=1e-9)


def test_owl_is_the_reference():
  """`(D - min) * 2 lambda / (max - min)`, shifted to the mean; three layers of one size."""
  shares = {'block_0': 0.01, 'block_1': 0.04, 'block_2': 0.02}
  solved = distribution.Outliers().densities(shares, dict.fromkeys(shares, 7), 0.3)
  raised = np.array([0, 0.16, 0.16 / 3])
  np.testing.assert_allclose(list(solved.values()), 0.3 + raised - raised.mean())
  text = distribution.as_map(solved)
  shapes = {f'{name}/mlp/up': (2, 3) for name in shares} | {'block_10/mlp/up': (2, 2)}
  found = distribution.unrounded_densities(shapes, 0.7, text)
  np.testing.assert_allclose(list(found.values()), [*solved.values(), 0.3], atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'expected'),
  [('owl', (5, 0.08)), ('owl:3:0.1', (3, 0.1)), ('uniform', None), ('owlet=0.5', None)],
)
def test_owl_is_spelt_with_both_numbers_or_none(name, expected):
  assert distribution.Outliers.parse(name) == (expected and distribution.Outliers(*expected))


@pytest.mark.parametrize(
  'name', ['owl:5', 'owl:0:0.08', 'owl:5:0.5', 'owl:5:1.5', 'owl:a:b', 'owl:']
)
def test_other_numbers_of_owl_are_one_line(name):
  with pytest.raises(
    UserError, match=rf"^config\.weight\.distribution='{name}': valid: owl, or owl:M"
  ):
    distribution.Outliers.parse(name)


def test_owl_in_training_and_a_sparsity_near_one_are_one_line():
  with pytest.raises(UserError, match=r"distribution='owl' .*sparse_lm\.prune.*valid: uniform, er"):
    distribution.unrounded_densities({'a': (2, 2)}, 0.5, 'owl')
  with pytest.raises(
    UserError, match=r'gives block_0 a sparsity of 1\.\d+; valid: a smaller LAMBDA'
  ):
    shares = {'block_0': 0.0, 'block_1': 0.1}
    distribution.Outliers().densities(shares, dict.fromkeys(shares, 7), 0.05)
