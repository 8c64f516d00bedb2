"""Associative recall, by a count over sequences."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from sparse_lm.core.errors import UserError
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.mqar import Mqar
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

VOCAB = 40
NONE = EvalData(np.empty(0, np.int32), 32, batch=4)


@pytest.fixture(scope='module')
def model(tiny_config):
  found = lm.from_config(tiny_config(data__context=32), VOCAB)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), plan_of(found).params
  )
  return EvalModel(found, {'params': params})


@pytest.fixture(scope='module')
def sequences(model):
  """The sequences that the model reads, the most pairs that fit."""
  return Mqar(sequences=30, associations=8)._draw(model, NONE)


def queries(tokens_L, pairs):
  """Reads a sequence as a person would: (place of the value, value) of each key that comes again."""
  named = dict(zip(tokens_L[: 2 * pairs : 2].tolist(), tokens_L[1 : 2 * pairs : 2].tolist()))
  assert len(named) == pairs
  rest = range(2 * pairs, len(tokens_L) - 1)
  return [(i + 1, named[int(tokens_L[i])]) for i in rest if int(tokens_L[i]) in named]


def test_each_key_comes_again_once_before_its_value(sequences):
  tokens_NxL, place_NxP = sequences
  assert tokens_NxL.shape == (30, 32) and tokens_NxL.min() >= 0 and tokens_NxL.max() < VOCAB
  for tokens_L, place_P in zip(tokens_NxL, place_NxP):
    found = queries(tokens_L, 8)
    assert sorted(place_P.tolist()) == [place for place, _ in found]
    assert [tokens_L[place] for place, _ in found] == [value for _, value in found]
    keys = tokens_L < VOCAB // 2
    assert keys.sum() == 16  # and no token in between is one


def test_short_gaps_are_the_likeliest(model):
  _, place_NxP = Mqar(sequences=2000, associations=1)._draw(model, NONE)
  counts = np.bincount((place_NxP[:, 0] - 3) // 2, minlength=15)
  want = np.arange(1.0, 16) ** -0.99
  np.testing.assert_allclose(counts / 2000, want / want.sum(), atol=0.04)


def test_metrics_are_those_of_a_count(model, sequences):
  values = Mqar(sequences=30, associations=8).run(model, NONE)
  right, nats = [], []
  logits = model.model.apply(model.variables, sequences[0])
  for tokens_L, logits_LxV in zip(sequences[0], np.asarray(logits, np.float64)):
    for place, value in queries(tokens_L, 8):
      log_p = log_softmax(logits_LxV[place - 1])
      right.append(log_p.argmax() == value)
      nats.append(-log_p[value])
  assert values == {
    'mqar_accuracy': pytest.approx(np.mean(right)),
    'mqar_loss': pytest.approx(np.mean(nats), rel=1e-5),
  }


def test_defaults_and_cards(model):
  assert Mqar().card(model, NONE) == {
    'sequences': 64,
    'length': 32,
    'associations': 2,
    'vocabulary': VOCAB,
    'seed': 0,
    'unit': {'mqar_accuracy': 'share of queries', 'mqar_loss': 'nats per query'},
  }
  assert Mqar(seed=1).run(model, NONE) != Mqar().run(model, NONE) == Mqar().run(model, NONE)


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'length': 33}, 'length=33 is not valid; valid: 4 to 32, the context'),
    ({'associations': 9}, 'associations=9 is not valid; valid: 1 to 8'),
    ({'sequences': 0}, 'sequences=0'),
  ],
)
def test_what_does_not_fit_is_refused(model, fields, said):
  with pytest.raises(UserError, match=said):
    Mqar(**fields).run(model, NONE)
