"""The loss on a split, with the components of a mixture."""

import math

import jax
import numpy as np
import pytest

from sparse_lm import evals
from sparse_lm.core.errors import UserError
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.loss import Loss, separated
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of

VOCAB = 11


@pytest.fixture(scope='module')
def model(tiny_config):
  found = lm.from_config(tiny_config(activation__name='relu'), VOCAB)
  draw = np.random.default_rng(0)
  shapes = plan_of(found).params
  params = jax.tree.map(
    lambda a: draw.normal(0.5 * (a.ndim == 1), 0.3, a.shape).astype('f'), shapes
  )
  return EvalModel(found, {'params': params})


def nats(model, tokens):
  """Of every prediction of windows of 16 tokens, by a softmax in NumPy."""
  found = []
  for begin in range(0, len(tokens) - 1, 16):
    window = tokens[begin : begin + 17]
    logits = np.asarray(model.model.apply(model.variables, window[None, :-1])[0], np.float64)
    chosen = logits[range(len(window) - 1), window[1:]]
    found.extend(np.log(np.exp(logits).sum(axis=-1)) - chosen)
  return np.array(found)


def test_a_mixture_has_a_loss_for_each_component_and_one_for_all(model):
  draw = np.random.default_rng(1)
  parts = {'a': draw.integers(0, VOCAB, 50), 'b': draw.integers(0, 3, 21)}
  parts = {name: tokens.astype(np.int32) for name, tokens in parts.items()}
  whole = np.concatenate(list(parts.values()))
  values = Loss().run(model, EvalData(whole, 16, 2, 'test', 2.5, parts))
  want = {name: nats(model, tokens) for name, tokens in parts.items()}
  for name, each in want.items():
    assert values[f'test_loss/{name}'] == pytest.approx(each.mean(), rel=1e-5)
  mean = np.concatenate(list(want.values())).mean()
  assert values['test_loss'] == pytest.approx(mean, rel=1e-5)
  assert values['test_bits_per_byte'] == pytest.approx(mean / math.log(2) / 2.5, rel=1e-5)
  numbers, observed = separated(values, 'test')
  assert numbers.keys() == {'test_loss', 'test_bits_per_byte', 'test_loss/a', 'test_loss/b'}
  assert 0 < observed['block_0/mlp/active'] < 1
  assert values.keys() == numbers.keys() | {f'test/{name}' for name in observed}


def test_one_corpus_has_one_loss_and_tokens_without_text_have_no_bits(model):
  tokens = np.random.default_rng(2).integers(0, VOCAB, 40).astype(np.int32)
  numbers, _ = separated(Loss().run(model, EvalData(tokens, 16)))
  assert numbers == {'val_loss': pytest.approx(nats(model, tokens).mean(), rel=1e-5)}


def test_a_split_without_a_prediction_is_named(model):
  with pytest.raises(UserError, match='the test split has 1 tokens'):
    Loss().run(model, EvalData(np.zeros(1, np.int32), 16, split='test'))


def test_every_evaluation_is_found_by_name():
  assert set(evals.names()) >= {'loss', 'speed', 'energy'}
  assert evals.evaluation('loss') is Loss
  with pytest.raises(UserError, match="unknown evaluation 'los': did you mean 'loss'"):
    evals.evaluation('los')
