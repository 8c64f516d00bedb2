"""Which rule owns which parameter, and each rule's method against the method alone on what it owns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.model import slots
from sparse_lm.weights import parts
from sparse_lm.weights.rules import Rule, Rules, fields_of, owners

PATHS = ['block_0/attention/query', 'block_0/mlp/up', 'block_1/attention/query', 'block_1/mlp/up']
KEY = jax.random.key(4)


def test_the_first_rule_that_matches_owns_a_parameter():
  owned, notes = owners({'mlp': ('mlp',), 'first': ('block_0', '^nothing')}, PATHS)
  assert owned == {
    'mlp': {'block_0/mlp/up', 'block_1/mlp/up'},
    'first': {'block_0/attention/query'},
  }
  assert notes == (
    "the rules 'mlp' and 'first' both match block_0/mlp/up; the first of them, 'mlp', applies",
    'no rule matches block_1/attention/query; they stay dense',
  )
  swapped, _ = owners({'first': ('block_0', '^nothing'), 'mlp': ('mlp',)}, PATHS)
  assert swapped == {'first': set(PATHS[:2]), 'mlp': {'block_1/mlp/up'}}


def test_there_is_no_note_if_each_parameter_matches_exactly_one_rule():
  _, notes = owners({'attention': ('attention',), 'mlp': ('mlp',)}, PATHS)
  assert notes == ()


def test_a_note_lists_three_paths_and_counts_the_others():
  paths = [f'block_{i}/mlp/up' for i in range(9)]
  _, notes = owners({'most': ('block_[0-7]',), 'all': ('mlp',)}, paths)
  assert 'block_0/mlp/up, block_1/mlp/up, block_2/mlp/up and 5 more' in notes[0]


@pytest.mark.parametrize(('rules', 'words'), [
  ({'mpl': ('mpl',)}, ["config.weight.rules.mpl.match=('mpl',)", 'matches no prunable']),
  ({'a': ('.',), 'b': ('mlp',)}, ['config.weight.rules.b.match', 'only parameters of earlier rules (a)']),
  ({'a': ('attention',), 'b': ('mlp',), 'c': ('block_1',)}, ['rules.c.match', 'earlier rules (a, b)']),
  ({'a': ('(',)}, ['config.weight.rules.a.match', 'a regular expression']),
])  # fmt: skip
def test_a_rule_without_parameters_is_refused_in_one_line_that_lists_all_paths(rules, words):
  with pytest.raises(UserError) as refused:
    owners(rules, PATHS)
  line = str(refused.value)
  assert '\n' not in line and all(word in line for word in words), line
  if '(' not in rules.get('a', ()):
    assert all(path in line for path in PATHS), line


def test_an_error_of_a_rule_names_the_fields_of_the_rule():
  with pytest.raises(UserError) as refused, fields_of('mlp'):
    raise UserError('config.weight.end=0.5: config.weight.start=0.8, not config.weight.dense')
  assert str(refused.value) == (
    'config.weight.rules.mlp.end=0.5: config.weight.rules.mlp.start=0.8, not config.weight.dense'
  )


# Two methods on the leaves of a small tree, beside a dense leaf.

SHAPES = {'up': (16, 12), 'down': (12, 16), 'query': (16, 16), 'scale': (16,)}
OWNED = {'mlp': {'up', 'down'}, 'attention': {'query'}}
DENSITY = {'up': 0.5, 'down': 0.5, 'query': 0.25}


def method_of(name, **fields):
  return slots.method('weight', name)(total_steps=40, **fields)


FIRST = 'magnitude 2:4, RigL block:4'
PAIRS = {
  FIRST: {
    'mlp': method_of('magnitude', pattern='2:4', start=0.0, end=0.5, period=4),
    'attention': method_of('rigl', pattern='block:4', period=6, drop_fraction=0.5),
  },
  'static, straight-through': {
    'mlp': method_of('static'),
    'attention': method_of('magnitude', apply='straight_through', start=0.0, end=0.5),
  },
  'L0, set per output': {
    'mlp': method_of('l0', open=0.5, price=2.0, learned_rate=3.0),
    'attention': method_of('set', pattern='per_output', period=6),
  },
  'Top-KAST, AC/DC': {
    'mlp': method_of('top_kast', period=4),
    'attention': method_of('ac_dc'),
  },
  'none, magnitude': {
    'mlp': method_of('none'),
    'attention': method_of('magnitude', start=0.0, end=0.5, period=4),
  },
}


def draw(seed):
  normal = np.random.default_rng(seed).normal
  return {name: jnp.asarray(normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def rules_of(methods):
  made = (Rule(name, method, frozenset(OWNED[name])) for name, method in methods.items())
  return Rules(40, tuple(made))


def target_of(methods, names):
  learned = {name for name, method in methods.items() if method.traits.controlled}
  dropped = {name for name, method in methods.items() if method.traits.masked}
  return {
    path: jnp.float32(1.0 if rule in learned else DENSITY[path])
    if rule in names and rule in dropped
    else None
    for path in SHAPES
    for rule in [next((r for r in OWNED if path in OWNED[r]), None)]
  }


def close(found, want, paths):
  for path in paths:
    assert_array_equal(np.asarray(found[path]), np.asarray(want[path]), err_msg=path)


# One pair in `make test`.
@pytest.mark.parametrize(
  'pair', [pair if pair == FIRST else pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_each_rule_does_what_its_method_does_alone_on_what_the_rule_owns(pair):
  methods = PAIRS[pair]
  both = rules_of(methods)
  trainable, sparse = both.init(KEY, draw(0), target_of(methods, OWNED))
  alone = {
    name: method.init(KEY, draw(0), target_of(methods, {name})) for name, method in methods.items()
  }
  for step in range(13):
    drift, grads = draw(2 * step + 1), draw(2 * step + 2)
    key = jax.random.fold_in(KEY, step)
    seen, density = both.effective(trainable, sparse, 'train', jnp.int32(step), key)
    for name, method in methods.items():
      own, its = method.effective(*alone[name], 'train', jnp.int32(step), key)
      close(seen, own, OWNED[name])
      close(density, its, [path for path in OWNED[name] if its[path] is not None])
      assert (density['up'] is None) == (pair == 'none, magnitude')
    moved = jax.tree.map(lambda w, d: w + 0.1 * d, trainable['params'], drift)
    trainable = both.constrain(trainable | {'params': moved}, sparse)
    close(trainable['params'], moved, ['scale'])
    due = parts.due(both, step)
    assert due == tuple(name for name, method in methods.items() if method.due(step))
    signals = {name: dict.fromkeys(methods[name].traits.needs, grads) for name in due}
    if due:
      change = both.update_parts(due, trainable, sparse, signals, jnp.int32(step), key)
      trainable, sparse = change.trainable, change.sparse
    for name, method in methods.items():
      before, state = alone[name]
      moved = jax.tree.map(lambda w, d: w + 0.1 * d, before['params'], drift)
      own = method.constrain(before | {'params': moved}, state)
      if name in due:
        its = method.update(own, state, signals[name], jnp.int32(step), key)
        close(change.toggled, its.toggled, OWNED[name])
        own, state = its.trainable, its.sparse
      alone[name] = own, state
      close(trainable['params'], own['params'], OWNED[name])
      close(sparse.masks, state.masks, [p for p in OWNED[name] if state.masks[p] is not None])
      if due:  # a rule that is not due toggles nothing
        assert name in due or all(change.toggled[path] is None for path in OWNED[name])
  params, masks = both.finalize(trainable, sparse, jnp.int32(40))
  for name, method in methods.items():
    own, its = method.finalize(*alone[name], jnp.int32(40))
    close(params, own, OWNED[name])
    close(masks, its, [path for path in OWNED[name] if its[path] is not None])
  assert masks['scale'] is None


def test_only_leaves_of_rules_that_replace_the_step_skip_it():
  both = rules_of(PAIRS[FIRST])
  trainable, _ = both.init(KEY, draw(0), target_of(both.parts, OWNED))

  def rests(method, *due):
    found = tree.named(method.resting(due, trainable)['params'])
    return {path for path, flag in found.items() if flag}

  assert rests(both) == rests(both, 'mlp') == set()
  assert rests(both, 'attention') == rests(both, 'mlp', 'attention') == {'query'}
  # Alone in a model, a rule does what its method does: the whole optimizer rests.
  alone = Rules(40, both.rules[1:])
  assert rests(alone, 'attention') == set(SHAPES) and rests(alone) == set()


def test_each_rule_freezes_weights_of_its_own():
  methods = PAIRS['Top-KAST, AC/DC']
  both = rules_of(methods)
  trainable, sparse = both.init(KEY, draw(0), target_of(methods, OWNED))
  alone = methods['mlp'].init(KEY, draw(0), target_of(methods, {'mlp'}))
  frozen = both.frozen(sparse)
  close(frozen, methods['mlp'].frozen(alone[1]), OWNED['mlp'])
  assert {path: None if held is None else int(held.sum()) for path, held in frozen.items()} == {
    'up': 48, 'down': 48, 'query': None, 'scale': None
  }  # fmt: skip
  paid = both.penalty(trainable, sparse, None)
  assert float(paid) == float(methods['mlp'].penalty(*alone, None)) > 0
  target = {path: DENSITY[path] for path in DENSITY}
  assert parts.backward_densities(both, target, 0) == {'up': 0.75, 'down': 0.75, 'query': 1.0}
  assert parts.backward_densities(both, target, 5)['query'] == 0.25


def test_penalties_rates_and_costs_are_those_of_each_rules_method():
  methods = PAIRS['L0, set per output']
  both = rules_of(methods)
  density = {
    'up': jnp.float32(0.5),
    'down': jnp.float32(0.25),
    'query': jnp.float32(0.9),
    'scale': None,
  }
  # 192 weights each: the price is for those of the rule alone.
  state = both.init(KEY, draw(0), target_of(methods, OWNED))
  assert float(both.penalty(*state, density)) == pytest.approx(2.0 * 0.375)
  assert both.learned_rates == {'mlp/': 3.0}
  assert parts.learns_density(both, 'up') and not parts.learns_density(both, 'query')
  assert not parts.learns_density(both, 'scale') and both.owner('scale') is None
  pair = rules_of(PAIRS[FIRST])
  target = {path: DENSITY[path] for path in DENSITY}
  for step in range(40):
    found = parts.densities(pair, target, step)
    ramp = pair.parts['mlp'].density(0.5, step)
    assert found == {'up': ramp, 'down': ramp, 'query': 0.25}
    backward = parts.backward_densities(pair, target, step)
    rigl = pair.parts['attention'].due(step)
    assert backward == ({'up': ramp, 'down': ramp, 'query': 1.0} if rigl else None)


def test_traits_of_all_rules_together():
  both = rules_of(PAIRS[FIRST])
  assert both.traits.needs == ('grads',) and both.traits.masked and both.traits.exact_density
  assert not both.one_shot and not both.traits.takes_masks and not both.traits.controlled
  assert rules_of(PAIRS['L0, set per output']).traits.controlled
  assert rules_of({'mlp': method_of('static'), 'attention': method_of('static')}).traits.takes_masks
  assert both.due(0) and both.due(4) and both.due(6) and not both.due(7)
