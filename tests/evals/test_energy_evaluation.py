"""Joules per decoded token."""

import contextlib

import jax
import numpy as np
import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.energy import Energy
from sparse_lm.inference.workload import DECODED
from sparse_lm.measure import energy
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

VOCAB = 11


@pytest.fixture(scope='module')
def model(tiny_config):
  found = lm.from_config(tiny_config(data__context=32), VOCAB)
  shapes = plan_of(found).params
  return EvalModel(found, {'params': jax.tree.map(lambda a: np.ones(a.shape, 'f'), shapes)})


@pytest.mark.parametrize(('joules', 'want'), [(96.0, 96 / (3 * 2 * DECODED)), (None, None)])
def test_joules_are_divided_by_the_decoded_tokens(joules, want, model, monkeypatch):
  meters = []

  @contextlib.contextmanager
  def meter():
    yield meters.append(energy.Measured()) or meters[-1]
    meters[-1].joules = joules

  monkeypatch.setattr(energy, 'meter', meter)
  tokens = np.zeros(64, np.int32)
  values = Energy(repeats=3).run(model, EvalData(tokens, 32, batch=2))
  assert values == {'joules_per_token': want} and len(meters) == 1


def test_too_little_text_is_named(model):
  with pytest.raises(UserError, match='--batch=3'):
    Energy().run(model, EvalData(np.zeros(64, np.int32), 32, batch=3))
