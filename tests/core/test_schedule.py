import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sparse_lm.core import schedule
from sparse_lm.core.errors import UserError


@pytest.mark.parametrize('start, end, steps, expected', [
  (0.25, 0.75, 1000, (250, 750)),
  (0.0, 1.0, 7, (0, 6)),  # the last step that a run of 7 has
  (0.1, 0.9, 3, (0, 2)),
])  # fmt: skip
def test_span_rounds_to_steps(start, end, steps, expected):
  assert schedule.span(start, end, steps) == expected


@given(st.integers(0, 300), st.integers(0, 200), st.integers(1, 40))
@settings(deadline=None)
def test_due_steps_are_first_then_every_period_then_last(first, length, period):
  last = first + length
  expected = {*range(first, last + 1, period), last}
  found = {step for step in range(last + 2 * period + 2) if schedule.due(step, first, last, period)}
  assert found == expected


@given(
  st.integers(0, 100), st.integers(1, 100), st.integers(-20, 250), st.floats(0.0078125, 1, width=32)
)
@settings(deadline=None, max_examples=60)
def test_cubic_density_is_equation_1(first, length, step, final):
  step = max(step, 0)
  # Zhu & Gupta with initial sparsity 0: s_f + (0 - s_f) (1 - t)^3.
  progress = min(max((step - first) / length, 0), 1)
  sparsity = (1 - final) + (0 - (1 - final)) * (1 - progress) ** 3
  density = schedule.cubic_density(step, first, first + length, np.float32(final))
  assert float(density) == pytest.approx(1 - sparsity, abs=2e-6)


@pytest.mark.parametrize('first, last', [(0, 10), (5, 6), (7, 7), (0, 0)])
def test_cubic_density_is_final_from_last_on(first, last):
  """Also where the ramp has no length: one-shot pruning at `last`."""
  for step in (last, last + 1, last + 1000):
    assert float(schedule.cubic_density(step, first, last, 0.1)) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(('first', 'last'), [(0, 0), (5, 5), (0, 9), (3, 10)])
@pytest.mark.parametrize('final', [1 / 64, 0.5, 1.0])
def test_linear_density_interpolates(first, last, final):
  steps = np.arange(-1, 15)
  want = np.interp(steps, [first, last], [1.0, final])
  want = np.where(steps >= last, final, want)  # a span of one step has no way to go
  found = [schedule.linear_density(step, first, last, final) for step in steps]
  assert_allclose(found, want, rtol=1e-6)


def test_mean_sparsity_along_the_ramp_is_three_quarters_of_the_final_one():
  densities = jax.vmap(lambda s: schedule.cubic_density(s, 0, 10_000, 0.2))(np.arange(10_000))
  assert float(np.mean(1 - np.asarray(densities))) == pytest.approx(0.75 * 0.8, abs=1e-3)


@given(st.integers(0, 400), st.integers(1, 300), st.floats(0, 1, width=32))
@settings(deadline=None, max_examples=60)
def test_cosine_fraction_is_half_a_cosine(step, last, initial):
  expected = initial / 2 * (1 + math.cos(math.pi * min(step / last, 1)))
  assert float(schedule.cosine_fraction(step, last, initial)) == pytest.approx(expected, abs=1e-6)


def test_schedules_take_a_traced_step():
  cubic = jax.jit(lambda s: schedule.cubic_density(s, 10, 30, 0.5))
  cosine = jax.jit(lambda s: schedule.cosine_fraction(s, 40, 0.3))
  assert float(cubic(20)) == pytest.approx(1 - 0.5 * (1 - 0.125))
  assert float(cosine(20)) == pytest.approx(0.15)


def test_a_ramp_that_ends_before_it_starts_is_refused():
  with pytest.raises(UserError, match=r'^config\.weight\.end=0\.5 .*config\.weight\.start=0\.6'):
    schedule.check('cubic', 0.6, 0.5)
  schedule.check('cubic', 0.0, 0.0)
  schedule.check('cubic', 0.25, 0.75)
  schedule.check('at_once', 0.6, 0.5)  # the end is not read


def test_an_unknown_ramp_is_refused_with_the_nearest_one():
  with pytest.raises(
    UserError, match=r"^unknown config\.weight\.schedule 'at_one': did you mean 'at_o"
  ):
    schedule.check('at_one', 0.0, 1.0)


def test_pruning_at_once_is_a_ramp_of_no_length_at_its_start():
  assert schedule.ramp_span('at_once', 0.25, 0.75, 80) == (20, 20)
  assert schedule.ramp_span('cubic', 0.25, 0.75, 80) == (20, 60)
  assert schedule.ramp_span('at_once', 1.0, 0.0, 80) == (79, 79)  # the last step of the run
