import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.data import mixture, pipeline, sources

WEIGHTS = st.lists(st.floats(0.001, 1), min_size=1, max_size=6)
KINDS = ('files', 'stdlib', 'tfds')


def normalised(weights):
  return np.asarray(weights) / np.sum(weights)


@given(WEIGHTS, st.integers(0, 10**9), st.integers(0, 5000))
def test_any_consecutive_windows_have_the_fractions(weights, begin, length):
  shares = normalised(weights)
  component, _ = mixture.schedule(shares)(np.arange(begin, begin + length))
  counts = np.bincount(component, minlength=len(shares))
  assert (abs(counts - length * shares) <= 1 + length / mixture.CYCLE + len(shares)).all()
  if length >= 100 * (2 + len(shares)):
    assert (abs(counts / length - shares) < 0.01).all()


@settings(max_examples=20)
@given(WEIGHTS, st.integers(1, 3 * mixture.CYCLE))
def test_turns_of_a_component_are_numbered_from_zero_without_a_gap(weights, length):
  component, turn = mixture.schedule(normalised(weights))(np.arange(length))
  seen = dict.fromkeys(range(len(weights)), 0)
  for which, number in zip(component.tolist(), turn.tolist()):
    assert number == seen[which]
    seen[which] += 1


def test_parse():
  spec = ' stdlib = 3, files:a=b/**/*.txt=2,tfds:~/wiki/1.0.0=5'
  want = {'stdlib': 0.3, 'files:a=b/**/*.txt': 0.2, 'tfds:~/wiki/1.0.0': 0.5}
  assert mixture.parse(spec, dict.fromkeys(KINDS)) == want


@pytest.mark.parametrize(
  ('spec', 'said'),
  [
    ('', "entry '' has no weight"),
    ('stdlib', "entry 'stdlib' has no weight"),
    ('stdlib=1,', "entry '' has no weight"),
    ('stdlib=1, files:a.txt=x', "entry 'files:a.txt=x' has the weight 'x'"),
    ('stdlib=0', "'stdlib=0' has the weight '0'; valid: a number above 0"),
    ('stdlib=-1', "the weight '-1'"),
    ('stdlib=nan', "the weight 'nan'"),
    ('stdlib=inf', "the weight 'inf'"),
    (
      'stdlib=1, file:a=1',
      "source in config.data.path entry 'file:a=1': 'file': did you mean 'files'",
    ),
    ('mixture:a=1', 'valid: files, stdlib, tfds'),
    ('files:a=1, files:a=2', "'files:a=2' names 'files:a' a second time"),
    ('stdlib:3.11=1', 'stdlib takes no path; valid: stdlib=1'),
    ('stdlib=1, files:a=1e-5', "entry 'files:a' has a share of 1e-05; valid: 0.0001"),
  ],
)
def test_bad_entry_is_named(spec, said):
  with pytest.raises(UserError) as error:
    mixture.parse(spec, dict.fromkeys(KINDS))
  assert said in str(error.value) and '\n' not in str(error.value)


def stream(sizes, shares, context=5, batch=4, seed=0):
  """Component k's tokens are its positions from 1000 k on."""
  parts = {f'{k}': (1000 * k + np.arange(size), shares[k]) for k, size in enumerate(sizes)}
  return pipeline.mixed_iterator(parts, context=context, batch=batch, seed=seed)


def take(iterator, count):
  return np.stack([next(iterator) for _ in range(count)])


def test_windows_are_of_one_component_and_in_proportion():
  windows = take(stream([300, 50, 800], [0.5, 0.2, 0.3]), 1000).reshape(4000, 6)
  assert (np.diff(windows) == 1).all()
  counts = np.bincount(windows[:, 0] // 1000)
  assert abs(counts / 4000 - [0.5, 0.2, 0.3]).max() < 0.001


def test_a_component_is_read_as_if_it_were_alone():
  mixed = take(stream([90, 90], [0.25, 0.75]), 50).reshape(200, 6)
  alone = take(stream([90], [1.0]), 20).reshape(80, 6)
  first = mixed[mixed[:, 0] < 1000]
  assert len(first) == 50 and (first == alone[:50]).all()
  second = mixed[mixed[:, 0] >= 1000][:80] - 1000
  assert (second != alone).any(axis=1).mean() > 0.5  # another order than the first's


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 99))
def test_resume_is_exact(steps, batch, seed):
  first, second = (stream([100, 40], [0.7, 0.3], 5, batch, seed) for _ in range(2))
  take(first, steps + 1)
  second.set_state(json.loads(json.dumps(first.get_state())))
  assert (take(first, 20) == take(second, 20)).all()


TEXTS = {'a': 'abcé ' * 40, 'b': '\nThe cat sat.' * 30, 'c': 'xyz' * 50}


@pytest.fixture
def config(tmp_path):
  """Three components, the first of two documents."""
  (tmp_path / 'a2.txt').write_text(TEXTS['a'][::-1])
  for name, text in TEXTS.items():
    (tmp_path / f'{name}.txt').write_text(text)
  parts = (
    f'files:{tmp_path}/a*.txt=0.5',
    f'files:{tmp_path}/b.txt=0.3',
    f'files:{tmp_path}/c.txt=1',
  )
  fields = {'source': 'mixture', 'path': ', '.join(parts), 'split': (0.7, 0.2, 0.1)}
  sizes = {'vocab_size': 260, 'context': 4, 'batch': 3}
  return SimpleNamespace(**fields, tokenizer='bytes', **sizes)


def names(config):
  return [entry.strip().rpartition('=')[0] for entry in config.path.split(',')]


def test_card_lists_the_components_with_weights_and_hashes(config):
  corpus = sources.load(config)
  assert corpus.card == json.loads(json.dumps(corpus.card))
  assert list(corpus.card['components']) == names(config)
  for name, weight in zip(names(config), (0.5, 0.3, 1)):
    card = dict(corpus.card['components'][name])
    assert card.pop('weight') == pytest.approx(weight / 1.8)
    alone = sources.files(name.removeprefix('files:'), config.split)
    assert card == alone.card
  texts = [sources.files(name[6:], config.split).splits for name in names(config)]
  for split in corpus.splits:
    assert corpus.splits[split] == b'\0'.join(text[split] for text in texts)
  assert corpus.card['documents'] == {'train': 4, 'validation': 4, 'test': 4}


@pytest.mark.parametrize('tokenizer', ['bytes', 'chars', 'bpe'])
def test_each_component_is_found_in_the_tokens(config, tokenizer):
  config.tokenizer = tokenizer
  data = pipeline.load(config)
  for name in names(config):
    alone = sources.files(name[6:], config.split)
    for split, text in alone.splits.items():
      assert data.tokenizer.decode(data.tokens[split][data.spans[name][split]]).encode() == text
  for split in data.tokens:
    found = ''.join(data.tokenizer.decode(ids) for ids in data.components(split).values())
    joined = data.tokenizer.decode(data.tokens[split])
    # Each zero byte between components ends the one and begins the other.
    assert len(found) == len(joined) + 2 and sorted(found) == sorted(joined + '\0\0')


def test_evaluation_predicts_every_token_once_component_by_component(config):
  config.tokenizer = 'bpe'
  data = pipeline.load(config)
  ids, predicted = data.tokens['validation'], []
  for name in names(config):
    count = 0
    for tokens, weight in data.eval_batches(component=name):
      predicted += tokens[:, 1:][weight == 1].tolist()
      count += int(weight.sum())
    card = data.evaluation(component=name)
    assert card['predictions'] == count
    assert card['data_sha256'] == data.card['components'][name]['sha256']['validation']
    assert card['unit'] == 'nats per token of bpe'
  assert predicted == ids[1:].tolist()
  assert sum(weight.sum() for _, weight in data.eval_batches()) == len(ids) - 1
  assert data.evaluation()['predictions'] == len(ids) - 1
  assert data.evaluation()['data_sha256'] == data.card['sha256']['validation']


@pytest.mark.parametrize('tokenizer', ['bytes', 'chars', 'bpe'])
def test_a_mixture_of_one_is_that_one(config, tokenizer, tmp_path):
  config.tokenizer = tokenizer
  config.path = f'files:{tmp_path}/b.txt=3'
  mixed = pipeline.load(config)
  config.source, config.path = 'files', f'{tmp_path}/b.txt'
  alone = pipeline.load(config)
  assert mixed.card['sha256'] == alone.card['sha256']
  assert (take(mixed.train_iterator(3), 30) == take(alone.train_iterator(3), 30)).all()


def test_errors_name_the_component(config, tmp_path):
  config.path = f'files:{tmp_path}/a.txt=1, files:{tmp_path}/none.txt=1'
  with pytest.raises(UserError, match=r"entry 'files:.*none\.txt': .* matches no file"):
    sources.load(config)
  config.path = f'files:{tmp_path}/a.txt=1, files:{tmp_path}/c.txt=1'
  config.context = 120
  with pytest.raises(UserError, match=r'context=120 needs 121 .* 105 in files:.*c\.txt'):
    pipeline.load(config)
