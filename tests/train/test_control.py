"""The budget controller by hand, and on gates with a known optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from configs import base
from sparse_lm.core.errors import UserError
from sparse_lm.train.control import Budget, Control

FLOOR = 0.1  # of the plant: what no gate can skip


def budget(target=0.5, controller='dual', weight=3.0, rate=0.02):
  return Budget(target, controller, weight, rate)


def state(price, measured):
  return Control(jnp.float32(price), jnp.float32(measured))


def read(**fields):
  config = base.get_config()
  config.budget.update(fields)
  return Budget.from_config(config)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'controller': 'quadratc'}, "did you mean 'quadratic'? valid: dual, quadratic"),
    ({'controller': 'Duall'}, "unknown config.budget.controller 'Duall': did you mean 'dual'?"),
    # Also where the controller would not be used.
    ({'target': 1.0, 'controller': 'Duall'}, "did you mean 'dual'?"),
  ],
)
def test_bad_fields_are_refused_in_one_line(fields, said):
  with pytest.raises(UserError) as refused:
    read(**fields)
  assert said in str(refused.value) and '\n' not in str(refused.value)


def test_a_target_of_one_needs_no_controller_and_any_other_is_kept():
  assert read(target=1.0) is None and read() is None
  assert read(target=0.25, controller='quadratic', weight=0.0, rate=0.0) == Budget(
    0.25, 'quadratic', 0.0, 0.0
  )
  start = budget().init()
  assert float(start.price) == 0 and float(start.measured) == 1


def test_penalty_price_and_update_by_hand():
  held, control = budget(target=0.5, weight=3.0, rate=0.2), state(0.4, 0.9)
  assert_allclose(held.penalty(control, 0.7), 0.4 * 0.2 + 3 * 0.04, rtol=1e-6)
  assert_allclose(held.penalty(control, 0.4), -0.4 * 0.1 + 3 * 0.01, rtol=1e-5)
  assert_allclose(held.price(control, 0.7), 0.4 + 2 * 3 * 0.2, rtol=1e-6)
  after = held.update(control, 0.6)
  assert_allclose(after.measured, 0.9 * 0.9 + 0.1 * 0.6, rtol=1e-6)
  assert_allclose(after.price, 0.4 + 0.2 * (0.87 - 0.5), rtol=1e-6)
  # Below the target the price falls, and falls below zero.
  after = held.update(state(0.01, 0.2), 0.1)
  assert_allclose(after.price, 0.01 + 0.2 * (0.19 - 0.5), rtol=1e-5)


def test_the_quadratic_controller_measures_and_has_no_price():
  after = budget(controller='quadratic', rate=0.2).update(state(0.0, 1.0), 0.6)
  assert float(after.price) == 0
  assert_allclose(after.measured, 0.96, rtol=1e-6)


@given(st.floats(0.01, 0.99), st.floats(-2, 2), st.floats(0, 10), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_the_price_is_the_penaltys_slope(target, price, weight, fraction, measured):
  held, control = budget(target, weight=weight), state(price, measured)
  slope = float(held.price(control, jnp.float32(fraction)))

  def by_hand(f):
    return price * (f - target) + weight * (f - target) ** 2

  assert slope == pytest.approx(
    (by_hand(fraction + 1e-4) - by_hand(fraction - 1e-4)) / 2e-4, abs=1e-4
  )
  assert float(held.penalty(control, jnp.float32(fraction))) == pytest.approx(
    by_hand(fraction), abs=1e-5
  )


@functools.partial(jax.jit, static_argnums=0)
def settled(held, worth, start, control):
  """Gates worth `worth` nats per fraction, trained by gradient descent on their common logit.

  Returns the fractions of 3000 steps, and the controller's last state.
  """

  def step(carry, _):
    logit, control = carry

    def fraction(logit):
      return FLOOR + (1 - FLOOR) * jax.nn.sigmoid(logit)

    def loss(logit):
      return -worth * fraction(logit) + held.penalty(control, fraction(logit))

    control = held.update(control, fraction(logit))
    return (logit - 0.5 * jax.grad(loss)(logit), control), fraction(logit)

  logit = -jnp.log((1 - FLOOR) / (start - FLOOR) - 1)
  (_, control), fractions = jax.lax.scan(step, (logit, control), length=3000)
  return fractions, control


@pytest.mark.parametrize('target', [0.25, 0.5, 0.8])
@given(st.floats(0, 0.5), st.floats(0.3, 0.97))
@settings(deadline=None, max_examples=15)
def test_dual_ascent_reaches_the_target_at_the_price_of_the_gates_worth(target, worth, start):
  fractions, control = settled(budget(target), worth, start, budget(target).init())
  fractions = np.asarray(fractions)
  assert np.abs(fractions[-500:] - target).max() < 0.02
  assert float(control.price) == pytest.approx(worth, abs=0.05)
  assert float(control.measured) == pytest.approx(target, abs=0.02)


@given(st.floats(-0.5, 0.5), st.floats(0.11, 0.2), st.floats(0, 2))
@settings(deadline=None, max_examples=20)
def test_dual_ascent_opens_gates_that_closed_too_far(worth, start, price):
  # Gates worth less than nothing are held open by a price below zero.
  fractions, control = settled(budget(0.5), worth, start, state(price, start))
  assert float(fractions[0]) < 0.21
  assert np.abs(np.asarray(fractions)[-500:] - 0.5).max() < 0.02
  assert float(control.price) == pytest.approx(worth, abs=0.05)


@pytest.mark.parametrize('start', [0.12, 0.95])
@given(st.floats(-0.5, 0.5), st.floats(2, 10))
@settings(deadline=None, max_examples=10)
def test_the_quadratic_controller_stops_short_by_worth_over_twice_its_weight(start, worth, weight):
  held = budget(0.5, 'quadratic', round(weight))
  fractions, control = settled(held, worth, start, held.init())
  # Where 2 * weight * (fraction - target) equals what a little more is worth.
  assert float(fractions[-1]) == pytest.approx(0.5 + worth / (2 * round(weight)), abs=1e-3)
  assert float(control.price) == 0


def test_without_a_price_gates_worth_something_open_and_a_large_one_closes_them():
  free = budget(0.5, weight=0.0, rate=0.0)
  fractions, control = settled(free, 0.3, 0.9, state(0.0, 1.0))
  assert float(fractions[-1]) > 0.98 and float(control.price) == 0
  fractions, control = settled(free, 0.3, 0.9, state(20.0, 1.0))
  assert float(fractions[-1]) < FLOOR + 0.01 and float(control.price) == 20
