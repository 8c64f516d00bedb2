"""The loss on a split, with the components of a mixture."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from sparse_lm import evals
from sparse_lm.core.errors import UserError
from sparse_lm.data.tokenizers import Chars
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.evals.loss import Loss, mean_losses, separated
from sparse_lm.measure import device
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
  losses = {'test_loss', 'test_bits_per_byte', 'test_loss/a', 'test_loss/b'}
  assert numbers.keys() == losses | {'perplexity'}
  assert 0 < observed['block_0/mlp/active'] < 1
  assert values.keys() == numbers.keys() | {f'test/{name}' for name in observed}


def test_one_corpus_has_one_loss_and_tokens_without_text_have_no_bits(model):
  tokens = np.random.default_rng(2).integers(0, VOCAB, 40).astype(np.int32)
  numbers, _ = separated(Loss().run(model, EvalData(tokens, 16)))
  mean = nats(model, tokens).mean()
  assert numbers == {
    'val_loss': pytest.approx(mean, rel=1e-5),
    'perplexity': pytest.approx(math.exp(mean), rel=1e-4),
  }
  assert separated(mean_losses(model, EvalData(tokens, 16)))[0] == {'val_loss': numbers['val_loss']}


@pytest.mark.parametrize(
  ('stride', 'batch', 'size'), [(5, 1, 60), (5, 3, 60), (16, 2, 60), (3, 2, 9)]
)
def test_with_a_stride_every_token_is_predicted_once_from_the_first_window_that_has_it(
  model, stride, batch, size
):
  """A loop over windows in NumPy: a window predicts what no earlier one has predicted."""
  tokens = np.random.default_rng(3).integers(0, VOCAB, size).astype(np.int32)
  found, done = [], 0
  for begin in range(0, size, stride):
    end = min(begin + 16, size - 1)
    logits = model.model.apply(model.variables, tokens[None, begin : begin + 16])[0]
    logits = np.asarray(logits, np.float64)
    for place in range(done, end):
      row = logits[place - begin]
      found.append(np.log(np.exp(row).sum()) - row[tokens[place + 1]])
    done = max(done, end)
  assert len(found) == size - 1
  data = EvalData(tokens, 16, batch, stride=stride)
  values = Loss().run(model, data)
  assert values['val_loss'] == pytest.approx(np.mean(found), rel=1e-5)
  # Statistics come from all windows but the last: with a stride, too, those are full.
  assert 0 < values['val/block_0/mlp/active'] < 1


def test_words_are_counted_as_in_wikitext(model):
  """White space separates words, and the end of each line counts as a word."""
  text = Chars(''.join(sorted('\0\n abcdefgh')))
  assert text.vocab_size == VOCAB
  tokens = text.encode(' a b\ncd ef gh\n\nabc\0de').astype(np.int32)
  known = dataclasses.replace(model, tokenizer=text)
  values = Loss().run(known, EvalData(tokens, 16))
  words = 2 + 1 + 3 + 1 + 1 + 1 + 1 + 1
  each = values['val_loss'] * len(tokens) / words
  assert values['word_perplexity'] == pytest.approx(math.exp(each))
  spaces = Loss().run(known, EvalData(np.full(4, 2, np.int32), 16))
  assert spaces['word_perplexity'] is None


def test_a_hopeless_model_has_an_infinite_perplexity(model):
  scaled = jax.tree.map(lambda a: 1e4 * a, model.variables)
  tokens = np.arange(VOCAB, dtype=np.int32)
  assert Loss().run(dataclasses.replace(model, variables=scaled), EvalData(tokens, 16))[
    'perplexity'
  ]


def test_a_split_without_a_prediction_is_named(model):
  with pytest.raises(UserError, match='the test split has 1 tokens'):
    Loss().run(model, EvalData(np.zeros(1, np.int32), 16, split='test'))


def test_a_batch_that_does_not_fit_in_memory_is_refused(model, monkeypatch):
  monkeypatch.setattr(device, 'memory', lambda: 5000)
  tokens = np.arange(VOCAB, dtype=np.int32)
  with pytest.raises(UserError, match=r'context=16 and batch=8 take .* valid: a smaller --context'):
    Loss().run(model, EvalData(tokens, 16, 8))


def test_every_evaluation_is_found_by_name():
  assert set(evals.names()) >= {'loss', 'speed', 'energy'}
  assert evals.evaluation('loss') is Loss
  with pytest.raises(UserError, match="unknown evaluation 'los': did you mean 'loss'"):
    evals.evaluation('los')
