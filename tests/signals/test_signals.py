"""Every signal against NumPy, and how a method that misspells one is told."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sparse_lm import signals
from sparse_lm.core import discovery
from sparse_lm.core.errors import UserError

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(30, 5)).astype('f')
WEIGHTS, GRADIENT = DRAW.normal(size=(2, 5, 7)).astype('f')
BY_HAND = {
  'grads': GRADIENT,
  'x_sq': np.sum(X.astype(float) ** 2, axis=0),
  'xtx': X.astype(float).T @ X,
}


@pytest.mark.parametrize('name', discovery.names('sparse_lm.signals'))
def test_a_signal_is_its_definition(name):
  found = signals.signal(name)
  assert name in BY_HAND, f'add {name!r}, computed by NumPy, to BY_HAND in {__file__}'
  if name in signals.from_calibration((name,)):
    assert_allclose(found.of_inputs(X), BY_HAND[name], rtol=1e-5)
  else:
    assert_array_equal(found.of_gradient(WEIGHTS, GRADIENT), BY_HAND[name])
    assert found.batches >= 1


def test_training_signals_and_calibration_signals_are_told_apart():
  needs = ('xtx', 'grads', 'x_sq')
  assert list(signals.from_training(needs)) == ['grads']
  assert list(signals.from_calibration(needs)) == ['xtx', 'x_sq']


def test_an_unknown_signal_is_one_line_with_the_nearest_one():
  with pytest.raises(
    UserError, match=r"^unknown signal 'grad': did you mean 'grads'.*valid: .*xtx"
  ):
    signals.from_training(('grad',))
