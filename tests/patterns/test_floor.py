"""The pattern of weights with a floor in every channel, against NumPy and against all choices."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.core.groups import Group, Member
from sparse_lm.patterns import pattern
from sparse_lm.weights.rewire import drop_and_grow

SHAPES = {'up': (8, 6), 'down': (6, 4), 'other': (8, 6)}
AXES = {'up': -1, 'down': -2}
DECLARED = (
  Group('neuron', 'mlp', 6, tuple(Member(path, axis) for path, axis in AXES.items())),
  Group('layer', '', 1, (Member('other', None, 0),)),
)


def best(values, count):
  """The `count` largest, ties to the lower flat index."""
  mask = np.zeros(values.size, bool)
  mask[np.argsort(-values, axis=None, kind='stable')[:count]] = True
  return mask.reshape(values.shape)


def largest_total(channels, count, least):
  """Of all masks of `count` entries that keep `least` of each row: by how many each row keeps."""
  totals = {0: 0}
  for row in -np.sort(-channels.astype(np.int64), axis=1):
    longer = {}
    for taken, total in totals.items():
      for more in range(least, len(row) + 1):
        longer[taken + more] = max(longer.get(taken + more, 0), total + row[:more].sum())
    totals = longer
  return totals[count]


@functools.cache
def masks_of(path, least):
  units = pattern(f'floor:{least}', DECLARED)
  run = jax.jit(lambda scores, density: units.masks({path: scores}, {path: density})[path])
  return lambda scores, count: np.asarray(run(scores, np.float32(count / scores.size)))


@given(
  st.sampled_from(list(AXES)),
  st.integers(1, 3),
  st.integers(0, 30),
  st.integers(0, 2**31),
  st.sampled_from([1, 3, 10_000]),  # how many values: few of them make ties
)
@settings(deadline=None, max_examples=80)
def test_every_channel_keeps_its_floor_and_no_such_mask_has_a_larger_total(
  path, least, spare, seed, levels
):
  shape, across = SHAPES[path], -3 - AXES[path]
  count = min(least * shape[AXES[path]] + spare, math.prod(shape))
  scores = np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)
  mask = masks_of(path, least)(scores, count)
  assert mask.sum() == count and mask.sum(axis=across).min() >= least
  channels = np.moveaxis(scores, AXES[path], 0)
  assert scores[mask].sum() == largest_total(channels, count, least)
  # The paper's two steps: the first of each channel, then the largest of what is left.
  first = np.stack([best(row, least) for row in channels], axis=AXES[path])
  assert_array_equal(mask, best(np.where(first, np.inf, scores), count))


def test_only_declared_channels_have_a_floor():
  scores = {path: np.zeros((8, 6), 'f') for path in ('up', 'other')}
  for score in scores.values():
    score[:, 0] = 1
  masks = pattern('floor:1', DECLARED).masks(scores, dict.fromkeys(scores, np.float32(8 / 48)))
  assert np.asarray(masks['up']).sum(axis=0).tolist() == [3, 1, 1, 1, 1, 1]
  assert np.asarray(masks['other']).sum(axis=0).tolist() == [8, 0, 0, 0, 0, 0]


def test_drop_and_grow_keeps_the_floor_too():
  draw = np.random.default_rng(0)
  mask, weights, growth, noise = (draw.random((8, 6)).astype('f') for _ in range(4))
  growth[:, 0] += 9  # all growth would go to one output
  named = ({'up': array} for array in (mask > 0.6, weights, growth, 0.9, noise))
  new = drop_and_grow(*named, pattern('floor:2', DECLARED))[0]['up']
  assert new.sum() == (mask > 0.6).sum() and np.asarray(new).sum(axis=0).min() == 2


REFUSED = {
  'outputs': ('floor:4', 'up', 0.4, ['0.604167', '19 of 48 weights of up', '24 in total', '0.5']),
  'inputs': ('floor:2', 'down', 0.4, ['10 of 24 weights of down', '12 in total', 'at most 0.5']),
  'more than a channel has': ('floor:9', 'up', 1.0, ['54 in total; valid: a lower floor']),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_a_floor_above_the_count_is_one_line_that_says_what_is_valid(case):
  name, path, density, words = REFUSED[case]
  shapes = {path: SHAPES[path], 'other': (8, 6)}
  with pytest.raises(UserError, match=r'^config\.weight\.pattern') as refused:
    pattern(name, DECLARED).round_to_units(shapes, dict.fromkeys(shapes, density))
  message = str(refused.value)
  assert '\n' not in message and all(word in message for word in words), message


def test_a_floor_that_keeps_every_weight_is_accepted():
  shapes = {path: SHAPES[path] for path in AXES}
  found = pattern('floor:4', DECLARED).round_to_units(shapes, {'up': 0.5, 'down': 1.0})
  assert found == {'up': 0.5, 'down': 1.0}
