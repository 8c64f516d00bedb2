"""Every numeric field has a range, and values outside of it are refused before anything is built."""

import contextlib
import functools
import importlib
import itertools
import math
import operator
import pathlib
import re
import sys
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from sparse_lm.commands.parser import Parser
from sparse_lm.core import ranges
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import Range
from sparse_lm.model import slots
from sparse_lm.runs import configs, setup
from sparse_lm.runs.build import build
from sparse_lm.train.optim import DENSE_ONLY, TESTED, Optimizer

METHODS = [(slot, name) for slot in slots.SLOTS for name in slots.names(slot)]


def is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(values):
  """Fields whose value is a number or a tuple of numbers."""
  return {
    field
    for field, value in values.items()
    if is_number(value) or (isinstance(value, tuple) and value and all(map(is_number, value)))
  }


def test_every_number_of_the_base_config_has_a_range_with_its_default():
  values = configs.flat(base.get_config())
  assert numeric(values) == set(ranges.BASE_FIELDS)
  for field, range_ in ranges.BASE_FIELDS.items():
    range_.require(field, values[field])


@pytest.mark.parametrize(('slot', 'name'), METHODS)
def test_every_number_of_a_method_has_a_range_with_its_default(slot, name):
  own, defaults = ranges.of_fields(slots.method(slot, name)), slots.defaults(slot, name)
  assert numeric(defaults) == set(own)
  for field, range_ in own.items():
    range_.require(field, defaults[field])


def ends(range_):
  """Both ends, and whether each is excluded."""
  return (*range_.ends, '(' in range_.interval, ')' in range_.interval)


def outside(range_):
  """Values just outside of the range, far outside, and what is no number."""
  low, high, above, below = ends(range_)
  if range_.kind is int:
    near = [low - (not above), high + (not below)]
    return [*near, -1 - abs(low), 2**63, -(2**63), 10**400, 10**5000]
  lower, higher = np.nextafter(np.float32([low, high]), np.float32([-np.inf, np.inf]))
  near = [low if above else float(lower), high if below else float(higher)]
  return [*near, math.nan, math.inf, -math.inf, 1e39, -1e300, 10**400]


def inside(range_):
  """The outermost values in the range."""
  low, high, above, below = ends(range_)
  if range_.kind is int:
    return [low + above, high - below]
  first, last = np.float32(low), min(np.float32(high), np.finfo('f').max)
  first = np.nextafter(first, np.float32(np.inf)) if above else first
  last = np.nextafter(last, np.float32(0)) if below and high < math.inf else last
  return [float(first), float(last)]


def cases():
  """Every numeric field: what brings it into the config, its name and its range."""
  for field, range_ in ranges.BASE_FIELDS.items():
    yield {}, field, range_
  for slot, name in METHODS:
    alone = slot in slots.LAYER_SLOTS and not slots.wraps(slot, name)
    for group in [slot, f'{slot}.fallback'] if alone else [slot]:
      for field, range_ in ranges.of_fields(slots.method(slot, name)).items():
        yield {f'{group}.name': name}, f'{group}.{field}', range_


CASES = {
  '-'.join([*given.values(), field]): (given, field, range_) for given, field, range_ in cases()
}


def put(config, field, value):
  """Sets a field of a loaded config, whatever the type; a ConfigDict refuses ints beyond any float."""
  *groups, key = field.split('.')
  node = functools.reduce(operator.getitem, groups, config)
  with node.unlocked(), node.ignore_type(), contextlib.suppress(OverflowError):
    node[key] = value


@pytest.mark.parametrize(('given', 'field', 'range_'), CASES.values(), ids=CASES)
def test_values_outside_a_range_are_refused_and_its_ends_accepted(given, field, range_):
  def whole(value):
    return (0.9, value) if field == 'data.split' else value

  file = str(configs.BASE)
  config = configs.load(file, given)
  for value in inside(range_):
    put(config, field, whole(value))
    configs.check(config)
  for value in outside(range_):  # as a program sets it after loading, or a damaged file holds it
    put(config, field, whole(value))
    with pytest.raises(UserError, match=rf'^config\.{field}=') as refused:
      build(config, 256)
    assert str(refused.value).endswith(f' is not valid; valid: {range_}')
  near = outside(range_)[0]
  for override in (whole(near), repr(whole(near)), '9' * 400):  # as it is typed
    with pytest.raises(UserError, match=rf'^config\.{field}='):
      configs.load(file, {**given, field: override})


@pytest.mark.parametrize('value', ['1', None, True, 1j, [1.0, None]])
def test_values_that_are_not_numbers_are_outside_every_range(value):
  assert not Range(float, '[0, inf)').holds(value) and not Range(int, '[0, 2^31)').holds(value)


@given(
  st.floats(-2, 2), st.floats(-2, 2), st.sampled_from(['[]', '[)', '(]', '()']), st.floats(-3, 3)
)
def test_an_interval_holds_what_its_notation_says(low, high, ends, value):
  holds = Range(float, f'{ends[0]}{low:f}, {high:f}{ends[1]}').holds(value)
  low, high, value = (np.float32(x) for x in (f'{low:f}', f'{high:f}', value))
  compare = {'[': operator.le, '(': operator.lt, ']': operator.le, ')': operator.lt}
  assert holds == (compare[ends[0]](low, value) and compare[ends[1]](value, high))


def test_an_interval_may_include_a_separate_zero_and_malformed_ones_are_refused():
  range_ = Range(float, '0 or [0.0001, inf)')
  assert [range_.holds(v) for v in (0, 0.0, 1e-5, 1e-4, 3, -1, math.inf)] == [1, 1, 0, 1, 1, 0, 0]
  for wrong in ('', '0, 1', '[0; 1]', '[a, 1]', '[0, 1'):
    with pytest.raises(ValueError, match='not an interval'):
      Range(float, wrong)


@pytest.mark.parametrize('text', ['0', '-1', '1.5', 'x', '9' * 400, '9' * 5000])
def test_a_range_is_the_type_of_a_command_line_argument(text):
  parser = Parser('x')
  parser.add_argument('--count', type=Range(int, '[1, 2^31)'))
  assert parser.parse_args(['--count=3']).count == 3
  with pytest.raises(
    UserError, match=r'--count.* is not valid; valid: a whole number in \[1, 2\^31\)'
  ):
    parser.parse_args([f'--count={text}'])


@pytest.mark.parametrize('name', [*TESTED, *DENSE_ONLY])
def test_optimizers_stay_finite_at_the_ends_of_their_ranges(name):
  """What a range accepts must not give NaN: a moment's decay of 1 did, by its bias correction."""
  momenta, b2s = (inside(ranges.BASE_FIELDS[f'optimizer.{field}']) for field in ('momentum', 'b2'))
  for momentum, b2 in itertools.product(momenta, b2s):
    fields = {'optimizer.name': name, 'optimizer.momentum': momentum, 'optimizer.b2': b2}
    config = configs.load(str(configs.BASE), fields)
    tx = Optimizer.from_config(config, masked=False, learned_rates={}).transform()
    params = {'params': {'w': jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}}
    state = tx.init(params)
    for scale in (1.0, -2.0):
      updates, state = tx.update({'params': {'w': jnp.full((3, 4), scale)}}, state, params)
      params = optax.apply_updates(params, updates)
    assert np.isfinite(params['params']['w']).all(), (momentum, b2)


def test_a_model_that_no_memory_holds_is_refused_before_anything_is_compiled(tiny_config):
  for fields in (
    {
      'model__width': 2**20,
      'model__hidden': 2**24,
      'model__heads': 2**10,
      'model__kv_heads': 2**10,
    },
    {'mlp__name': 'moe_topk', 'mlp__experts': 2**16, 'mlp__capacity': 0.0, 'mlp__hidden': 2**20},
    {'data__batch': 2**24, 'data__context': 64, 'data__tokenizer': 'bytes'},
  ):
    with pytest.raises(UserError, match=r'GiB of memory; valid: a smaller model') as refused:
      setup.setup(tiny_config(**fields))
    assert '\n' not in str(refused.value)


def test_a_width_of_many_divisors_is_answered_at_once(tiny_config):
  begin = time.perf_counter()
  with pytest.raises(UserError, match=r'heads=7 does not divide .*width=1048576; valid: 1, 2, 4'):
    build(tiny_config(model__width=2**20, model__heads=7), 256)
  assert time.perf_counter() - begin < 5


ROOT = pathlib.Path(__file__).resolve().parents[2]
NUMBERS = {
  'convert/__main__': ('--context',),
  'generate': (
    *('--tokens', '--temperature', '--top_k', '--top_p', '--seed'),
    *('--speculate', '--exit_layer'),
  ),
  'speed': ('--batch', '--repeats'),
  'prune': ('--segments', '--context'),
  'format_costs': ('--repeats',),
}


def test_numbers_of_a_command_line_have_ranges():
  """Every `add_argument` of the package whose `type` is a number's names a range instead."""
  for file in (ROOT / 'sparse_lm').rglob('*.py'):
    source = file.read_text(encoding='utf-8')
    assert not re.search(r'type=(int|float)\b', source), file
    found = re.findall(
      r"add_argument\(\s*'(--\w+)',\s*type=[A-Z]", source
    )  # Range(...), or one's name
    name = file.relative_to(ROOT / 'sparse_lm').with_suffix('').as_posix()
    assert tuple(found) == NUMBERS.get(name, ()), file


@pytest.mark.parametrize('text', ['-1', 'nan', 'inf', '1e39', 'x', '', '9' * 400])
@pytest.mark.parametrize(
  ('command', 'argument'), [(command, name) for command, names in NUMBERS.items() for name in names]
)
def test_a_number_of_a_command_line_is_refused_before_anything_is_read(
  command, argument, text, monkeypatch, capsys
):
  module = importlib.import_module(f'sparse_lm.{command}'.replace('/', '.'))
  needed = {
    'convert/__main__': ['--from=nowhere', '--out=nowhere/else'],
    'generate': ['--workdir=nowhere', '--prompt=a'],
    'speed': ['--workdir=nowhere'],
    'prune': ['--workdir=nowhere', '--out=nowhere/else'],
    'format_costs': [],
  }[command]
  monkeypatch.setattr(sys, 'argv', [command, *needed, f'{argument}={text}'])
  with pytest.raises(SystemExit) as stopped:
    module.main()
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and error.count('\n') == 1
  assert f'argument {argument}: {text!r} is not valid; valid: ' in error or len(text) > 300
