"""One contract for every weight method under every pattern: whole units, as many as asked for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.model import slots
from sparse_lm.runs.build import build
from sparse_lm.weights.method import WeightMethod

METHODS = {
  name: slots.method('weight', name)
  for name in slots.names('weight')
  if 'pattern' in slots.defaults('weight', name)
}
SHAPES = {'up': (8, 12), 'down': (12, 8)}
# A pair of matrices with 12 neurons and, of three of them each, four heads; each is a layer.
MEMBERS = (Member('up', -1), Member('down', -2))
GROUPS = (
  Group('neuron', 'mlp', 12, MEMBERS),
  Group('head', 'mlp', 4, MEMBERS),
  Group('layer', '', 2, (Member('up', None, 0), Member('down', None, 1))),
)
STEPS = 40
HALF = 0.5


def labels(pattern):
  """By leaf the unit of each weight, and the pool of units in which a half is kept."""

  def tile(name, rows, columns):
    """The number of the tile that a weight lies in."""
    i, o = np.indices(SHAPES[name])
    return i // rows * 100 + o // columns

  def along(axis_of, width=1):
    """Units along an axis of each leaf, the same in both."""
    return {name: np.indices(shape)[axis_of[name]] // width for name, shape in SHAPES.items()}

  each = {name: tile(name, 1, 1) for name in SHAPES}
  one = dict.fromkeys(SHAPES, 0)
  units, pools, shared = {
    'unstructured': (each, one, False),
    'global': (each, one, True),
    'per_output': (each, along({'up': 1, 'down': 1}), False),
    '2:4': (each, {name: tile(name, 4, 1) for name in SHAPES}, False),
    'block:4': ({name: tile(name, 4, 4) for name in SHAPES}, one, False),
    'row': (along({'up': 0, 'down': 0}), one, False),
    'column': (along({'up': 1, 'down': 1}), one, False),
    'neuron': (along({'up': 1, 'down': 0}), one, True),
    'head': (along({'up': 1, 'down': 0}, 3), one, True),
    'layer': ({'up': np.zeros((8, 12), int), 'down': np.ones((12, 8), int)}, one, True),
  }[pattern]
  # In unshared pools, and for single weights, what belongs to a leaf is its own.
  for number, name in enumerate(SHAPES):
    offset = 100_000 * number
    units[name] = units[name] + offset * (not shared or pattern == 'global')
    pools[name] = np.broadcast_to(pools[name] + offset * (not shared), SHAPES[name])
  return units, pools


PATTERNS = ['unstructured', 'global', 'per_output', '2:4', 'block:4', 'row', 'column']
PATTERNS += ['neuron', 'head', 'layer']


def shares_of_whole_units(masks, pattern):
  """The kept share of each pool of units, whose weights all share their unit's fate."""
  units, pools = labels(pattern)
  flat = {
    what: np.concatenate([np.asarray(leaves[name]).ravel() for name in SHAPES])
    for what, leaves in (('mask', masks), ('unit', units), ('pool', pools))
  }
  shares = []
  for pool in np.unique(flat['pool']):
    inside = flat['pool'] == pool
    members = np.unique(flat['unit'][inside])
    fates = [set(flat['mask'][inside & (flat['unit'] == unit)].tolist()) for unit in members]
    assert all(len(fate) == 1 for fate in fates), pattern
    shares.append(sum(fate == {True} for fate in fates) / len(members))
  return shares


def method_of(name, pattern):
  own = {'start': 0.0, 'end': 0.75, 'period': 10, 'drop_fraction': 1.0, 'open': HALF}
  given = {field: own[field] for field in own if field in slots.defaults('weight', name)}
  return METHODS[name](total_steps=STEPS, pattern=pattern, groups=GROUPS, **given)


def signals_of(needs):
  """Random ones: `x_sq` and `xtx` of 50 rows of inputs, dense gradients of `grads`."""
  draw = np.random.default_rng(1)
  x = {name: draw.normal(size=(50, shape[0])) for name, shape in SHAPES.items()}
  found = {
    'grads': {name: draw.normal(size=shape) for name, shape in SHAPES.items()},
    'x_sq': {name: (rows**2).mean(0) for name, rows in x.items()},
    'xtx': {name: rows.T @ rows / 50 for name, rows in x.items()},
  }
  return {need: jax.tree.map(jnp.float32, found[need]) for need in needs}


def accepted(name, pattern):
  try:
    method_of(name, pattern).check()
  except UserError:
    return False
  return True


PAIRS = [pair for pair in itertools.product(METHODS, PATTERNS) if accepted(*pair)]


def test_every_method_takes_every_pattern_but_those_that_it_cannot_rank_or_grow():
  refused = {pair for pair in itertools.product(METHODS, PATTERNS) if pair not in PAIRS}
  several_layers = {('wanda', 'global'), ('wanda', 'layer')}
  several_matrices = {('alps', p) for p in ('global', 'neuron', 'head', 'layer')}
  # What grows from zero in all of its matrices at once gets no gradient.
  growing = ('ac_dc', 'rigl', 'set', 'top_kast', 'weight_sparse')
  grown = set(itertools.product(growing, ('neuron', 'head', 'layer')))
  assert refused == several_layers | several_matrices | grown | {
    ('sparsegpt', p) for p in PATTERNS if p not in ('unstructured', '2:4')
  }
  with pytest.raises(UserError, match=r'config\.weight\.pattern=.*neuron.*valid: .*single weights'):
    method_of('sparsegpt', 'neuron').check()
  with pytest.raises(UserError, match=r'config\.weight\.pattern=.*global.*valid: .*one layer'):
    method_of('wanda', 'global').check()


@pytest.mark.parametrize(('pattern', 'words'), [
  ('2:5', ["'2:5'", "5 doesn't divide the 16 inputs of"]),
  ('1:3', ["'1:3'", "3 doesn't divide the 16 inputs of"]),
  ('block:5', ["'block:5'", 'of 16 x', 'a divisor of 16']),
  ('block:32', ["'block:32'", 'of 16 x', 'a divisor of 16']),
])  # fmt: skip
@pytest.mark.parametrize('given', [
  {'weight__name': 'static'},
  {'weight__name': 'l0'},
  {'weight__name': 'static', 'weight__distribution': 'mlp=0.5'},
  {'weight__name': 'static', 'weight__distribution': 'attention=0.25,mlp=0.5', 'weight__sparsity': 0.5},
])  # fmt: skip
def test_units_that_do_not_fit_the_model_are_one_line(given, pattern, words, tiny_config):
  with pytest.raises(UserError, match=r'^config\.weight\.pattern') as refused:
    build(tiny_config(**given, weight__pattern=pattern), 23)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


@pytest.mark.parametrize('pattern', ['2:4', 'block:8'])
@pytest.mark.parametrize('budget', ['uniform', 'mlp=0.5'])
def test_units_that_fit_are_built_at_sparsity_zero(pattern, budget, tiny_config):
  given = {'weight__name': 'static', 'weight__pattern': pattern, 'weight__distribution': budget}
  _, target = build(tiny_config(**given), 23)
  found = {path: float(density) for path, density in tree.named(target).items()}
  halved = {path for path, density in found.items() if density == HALF}
  assert halved == {path for path in found if 'mlp' in path and budget != 'uniform'}
  assert set(found.values()) - {HALF} == {1.0}


@pytest.mark.parametrize(('given', 'words'), [
  ({'weight__pattern': 'per_output', 'weight__sparsity': 0.97}, ['16 units of', '0.97', '0.9375']),
  ({'weight__pattern': 'block:8', 'weight__sparsity': 0.9}, ['4 units of', '0.9', '0.75']),
  ({'weight__pattern': 'head', 'weight__sparsity': 0.25}, ['2 units of', '0 or 0.5']),
  ({'weight__pattern': '2:4', 'weight__distribution': 'mlp=0.75'}, ["'2:4'", '0.75', 'sparsity=0.5']),
])  # fmt: skip
def test_a_sparsity_that_units_cannot_express_is_one_line_with_valid_ones(
  given, words, tiny_config
):
  with pytest.raises(UserError, match=r'^config\.weight\.pattern') as refused:
    build(tiny_config(weight__name='static', **given), 23)
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


# Each method with some patterns; `make test-slow` runs all pairs.
@pytest.mark.parametrize(
  ('name', 'pattern'),
  [
    pair if number % 3 == 0 else pytest.param(*pair, marks=pytest.mark.slow)
    for number, pair in enumerate(PAIRS)
  ],
)
def test_units_stay_whole_and_their_count_is_exact(name, pattern):
  method = method_of(name, pattern)
  draw = np.random.default_rng(0)
  params = {leaf: draw.normal(size=shape).astype('f') for leaf, shape in SHAPES.items()}
  # A method that learns its density starts from dense targets, and here keeps the first half.
  density = 1.0 if method.traits.controlled else HALF
  target = dict.fromkeys(SHAPES, jnp.float32(density))
  trainable, sparse = jax.jit(method.init)(jax.random.key(0), params, target)
  if method.traits.controlled:
    trainable['learned'] = jax.tree.map(
      lambda s: jnp.where(jnp.arange(s.size) < s.size // 2, 10.0, -10.0).reshape(s.shape),
      trainable['learned'],
    )
  started = sparse.masks
  stored = bool(jax.tree.leaves(started))
  updates = stored and type(method).update is not WeightMethod.update
  due = [step for step in range(STEPS) if method.due(step)] or [STEPS] * updates
  update = jax.jit(functools.partial(method.update, signals=signals_of(method.traits.needs)))
  for step in due:
    change = update(trainable, sparse, step=jnp.int32(step), key=jax.random.key(step))
    trainable, sparse = change.trainable, change.sparse
    if stored:
      shares_of_whole_units(sparse.masks, pattern)
  final, masks = jax.jit(method.finalize)(trainable, sparse, jnp.int32(STEPS))
  if (
    method.traits.controlled and pattern == '2:4'
  ):  # it learns how much of a matrix is left: groups differ
    assert [np.mean(mask) for mask in masks.values()] == [HALF] * len(masks)
  else:
    assert set(shares_of_whole_units(masks, pattern)) == {HALF}
  for leaf, mask in masks.items():
    assert not np.asarray(final[leaf])[~np.asarray(mask)].any()
  # Of one layer or two heads that are left, what is dropped may be nothing, or grow again.
  if updates and pattern not in ('layer', 'head'):
    assert any((started[leaf] != masks[leaf]).any() for leaf in SHAPES)
