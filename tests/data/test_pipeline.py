import hashlib
import json
import math
from types import SimpleNamespace

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.data import pipeline


def take(iterator, count):
  return np.stack([next(iterator) for _ in range(count)])


def stream(seed=0, tokens=500, context=7, batch=4):
  # The tokens are their own positions, so a batch shows where its windows began.
  return pipeline.train_iterator(np.arange(tokens), context=context, batch=batch, seed=seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 60), st.integers(0, 2**32))
def test_train_windows_are_contiguous_text(context, batch, extra, seed):
  iterator = stream(seed, context + 1 + extra, context, batch)
  windows = take(iterator, 8)
  assert windows.shape == (8, batch, context + 1) and windows.dtype == np.int32
  assert (np.diff(windows) == 1).all()
  assert windows.min() >= 0 and windows.max() <= context + extra


def test_each_epoch_takes_every_stretch_once_in_a_new_order_and_cut():
  context, stretches = 5, 12
  iterator = stream(0, context * stretches + context, context, batch=stretches)
  starts = take(iterator, 6)[..., 0]  # one batch is one epoch, and no start wraps
  assert (np.sort(starts // context, axis=1) == np.arange(stretches)).all()
  orders = {tuple(epoch) for epoch in starts // context}
  cuts = {tuple(np.sort(epoch) % context) for epoch in starts}
  assert len(orders) == len(cuts) == 6


def test_order_does_not_depend_on_the_batch_size():
  size, context = 100, 7  # 14 stretches: batches straddle epochs
  one, many = (stream(5, size, context, batch) for batch in (3, 45))
  assert (take(one, 30).reshape(90, -1) == take(many, 2).reshape(90, -1)).all()


def test_every_start_is_reached():
  starts = take(stream(0, tokens=40, context=7, batch=50), 20)[..., 0]
  assert set(starts.flatten().tolist()) == set(range(40 - 7))


def test_shortest_corpus():
  assert (take(stream(0, tokens=8, context=7), 3) == np.arange(8)).all()


def test_small_token_types_are_read_as_int32():
  tokens = np.full(20, 255, np.uint8)
  got = next(pipeline.train_iterator(tokens, context=4, batch=2, seed=0))
  assert got.dtype == np.int32 and (got == 255).all()


def test_seed_decides_everything():
  a, again, b = (take(stream(seed), 40) for seed in (3, 3, 4))
  assert (a == again).all()
  assert (a != b).any(axis=(1, 2)).mean() > 0.9


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 99))
def test_resume_is_exact(steps, batch, seed):
  first = stream(seed, batch=batch)
  for _ in range(steps):
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  second = stream(seed, batch=batch)
  second.set_state(state)
  assert (take(first, 20) == take(second, 20)).all()


def test_resume_through_orbax(tmp_path):
  first = stream()
  take(first, 33)
  with ocp.CheckpointManager(tmp_path / 'checkpoints') as manager:
    manager.save(33, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
    manager.wait_until_finished()
    second = stream()
    take(second, 5)  # a restore replaces whatever the iterator had already given
    manager.restore(33, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
  assert (take(first, 20) == take(second, 20)).all()


@pytest.mark.parametrize('taken', [0, 1, 13])
def test_a_position_counts_the_batches_that_were_returned(taken):
  tokens = {'': (np.arange(500), 1.0)}

  def on_device():
    return pipeline.mixed_iterator(tokens, context=7, batch=4, seed=0, on_device=True)

  whole, first, second = stream(), on_device(), on_device()
  for _ in range(taken):
    batch = next(first)
    assert isinstance(batch, jax.Array) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, next(whole))
  assert first.get_state() == whole.get_state()
  take(second, 5)  # the reading thread is ahead of what was handed out
  second.set_state(json.loads(json.dumps(first.get_state())))
  assert (take(second, 20) == take(whole, 20)).all()


@settings(deadline=None)
@given(st.integers(2, 90), st.integers(1, 9), st.integers(1, 4))
def test_eval_predicts_every_token_exactly_once(size, context, batch):
  tokens = np.arange(1, size + 1)
  times = np.zeros(size + 1, int)
  for tokens_BxL1, weight_BxL in pipeline.eval_batches(tokens, context=context, batch=batch):
    assert tokens_BxL1.shape == (batch, context + 1) and tokens_BxL1.dtype == np.int32
    assert weight_BxL.shape == (batch, context) and weight_BxL.dtype == np.float32
    assert weight_BxL.any()
    for row, weights in zip(tokens_BxL1, weight_BxL):
      for given_token, target, weight in zip(row, row[1:], weights):
        assert weight in (0, 1)
        if weight:
          assert target == given_token + 1
          times[target] += 1
        else:
          assert target == 0
  assert times.tolist() == [0, 0] + [1] * (size - 1)


def test_short_corpora_are_refused_at_the_call():
  with pytest.raises(
    UserError, match=r'config\.data\.context=7 needs 8 training tokens, but there are 5;.* 4'
  ):
    stream(tokens=5)
  with pytest.raises(UserError, match=r'data\.batch=0'):
    stream(batch=0)
  for size in (0, 1):
    with pytest.raises(UserError, match=rf'the test split has {size} tokens.*config\.data\.split'):
      pipeline.eval_batches(np.zeros(size, np.uint8), context=4, batch=2, split='test')


def config(tmp_path, text, **changes):
  (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
  fields = {
    'source': 'files',
    'path': str(tmp_path / 'text.txt'),
    'split': (0.5, 0.3, 0.2),
    'tokenizer': 'chars',
    'vocab_size': 1024,
    'context': 4,
    'batch': 3,
  }
  return SimpleNamespace(**{**fields, **changes})


def test_load(tmp_path):
  text = 'aé' * 50
  data = pipeline.load(config(tmp_path, text))
  assert data.tokenizer.vocab_size == data.card['vocab_size'] == 2
  assert ''.join(data.tokenizer.decode(ids) for ids in data.tokens.values()) == text
  assert data.card == json.loads(json.dumps(data.card))
  assert data.card['tokens'] == {'train': 50, 'validation': 30, 'test': 20}
  assert data.card['bytes'] == {'train': 75, 'validation': 45, 'test': 30}
  assert data.card['bytes_per_token'] == dict.fromkeys(data.tokens, 1.5)
  assert data.card['tokenizer_sha256'] == data.tokenizer.digest
  assert next(data.train_iterator(0)).shape == (3, 5)
  assert (take(data.train_iterator(1), 3) == take(data.train_iterator(1), 3)).all()
  for split, size in (('validation', 30), ('test', 20)):
    weights = [weight.sum() for _, weight in data.eval_batches(split)]
    assert sum(weights) == size - 1 and len(weights) == math.ceil((size - 1) / 12)
    assert data.evaluation(split) == {
      'split': split,
      'data_sha256': hashlib.sha256('aé'.encode() * (size // 2)).hexdigest(),
      'context': 4,
      'stride': 4,
      'predictions': size - 1,
      'tokenizer_sha256': data.tokenizer.digest,
      'unit': 'nats per token of chars',
    }
  with pytest.raises(UserError, match="unknown split 'valid'"):
    data.eval_batches('valid')


def test_load_without_a_test_split(tmp_path):
  data = pipeline.load(config(tmp_path, 'ab' * 50, split=(0.9, 0.1, 0.0), tokenizer='bytes'))
  assert set(data.card['bytes_per_token']) == {'train', 'validation'}
  with pytest.raises(UserError, match='the test split has 0 tokens'):
    data.eval_batches('test')


def test_load_refuses_too_little_text_before_training(tmp_path):
  with pytest.raises(UserError, match=r'config\.data\.context=4 needs 5'):
    pipeline.load(config(tmp_path, 'abcdefgh'))
  with pytest.raises(UserError, match='the validation split has 1 tokens'):
    pipeline.load(config(tmp_path, 'abcdefghij', split=(0.8, 0.1, 0.1)))
