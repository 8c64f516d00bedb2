import hashlib
import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.data import sources, tokenizers

SHAKESPEARE = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data' / 'tiny_shakespeare.txt'
TEXT = st.text(st.characters(exclude_categories=['Cs']))  # surrogates are not text
VOCABULARY = 270  # what bpe may have


def corpus(train, validation='', test=''):
  texts = {'train': train, 'validation': validation, 'test': test}
  return sources.Corpus({name: text.encode() for name, text in texts.items()}, {})


@given(TEXT)
def test_bytes(text):
  tokenizer = tokenizers.build('bytes', corpus(text), VOCABULARY)
  ids = tokenizer.encode(text.encode())
  assert ids.dtype == np.uint8 and ids.tolist() == list(text.encode())
  assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
  assert tokenizer.vocab_size == 256


def test_bytes_decode_what_is_not_utf8():
  assert tokenizers.Bytes().decode([104, 0xFF, 105]) == 'h\ufffdi'
  with pytest.raises(ValueError):
    tokenizers.Bytes().decode(np.array([256]))


@given(TEXT.filter(bool), TEXT, TEXT)
def test_chars(train, validation, test):
  tokenizer = tokenizers.build('chars', corpus(train, validation, test), VOCABULARY)
  vocabulary = sorted(set(train + validation + test))
  assert tokenizer.vocab_size == len(vocabulary)
  for text in (train, validation, test):
    ids = tokenizer.encode(text.encode())
    assert ids.ndim == 1 and ids.tolist() == [vocabulary.index(character) for character in text]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(('size', 'dtype'), [(256, np.uint8), (257, np.uint16)])
def test_chars_use_the_smallest_type(size, dtype):
  text = ''.join(map(chr, range(size)))
  ids = tokenizers.build('chars', corpus(text), VOCABULARY).encode(text.encode())
  assert ids.dtype == dtype and ids.tolist() == list(range(size))


def test_the_document_separator_is_a_character():
  tokenizer = tokenizers.build('chars', corpus('b\0a'), VOCABULARY)
  assert tokenizer.encode(b'a\0b').tolist() == [1, 0, 2]


@given(TEXT.filter(bool))
def test_json_round_trip(text):
  for name in tokenizers.NAMES:
    tokenizer = tokenizers.build(name, corpus(text), VOCABULARY)
    again = tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer and again.digest == tokenizer.digest
    assert len(tokenizer.digest) == 64


def test_digests_of_different_vocabularies_differ():
  three = [tokenizers.Bytes(), tokenizers.Chars('ab'), tokenizers.Chars('ac')]
  assert len({tokenizer.digest for tokenizer in three}) == 3
  canonical = b'{"chars":"ab","name":"chars"}'
  assert three[1].digest == hashlib.sha256(canonical).hexdigest()


def test_errors():
  with pytest.raises(UserError, match=r"config\.data\.tokenizer 'char': did you mean 'chars'"):
    tokenizers.build('char', corpus('a'), VOCABULARY)
  with pytest.raises(UserError, match=r"unknown tokenizer 'word': .*bpe, bytes"):
    tokenizers.from_json({'name': 'word'})
  chars = tokenizers.build('chars', corpus('ab'), VOCABULARY)
  with pytest.raises(UserError, match=r"no token for 'é' \(U\+00E9\)"):
    chars.encode('abé'.encode())
  with pytest.raises(UserError, match='byte 1 is not'):
    chars.encode(b'a\xff')
  with pytest.raises(IndexError):
    chars.decode([2])
  for size in (0, 65536):
    with pytest.raises(UserError, match=rf'found {size} different characters'):
      tokenizers.Chars('x' * size)


PROSE = 'The cat sat on the mat.\n\n  the cats, the hats: that is that!\n' * 3


@pytest.fixture(scope='module')
def bpe():
  return tokenizers.build('bpe', corpus(PROSE, 'unseen'), VOCABULARY)


@given(TEXT)
def test_bpe_gives_back_every_text(bpe, text):
  for given_text in (text, f'{text}\0{PROSE}\0{text}\n'):
    ids = bpe.encode(given_text.encode())
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert bpe.decode(ids) == bpe.decode(ids.tolist()) == given_text


@given(st.lists(st.text('tha \n.,é5', min_size=1), min_size=1, max_size=5))
def test_bpe_tokens_of_joined_texts_are_the_joined_tokens(bpe, texts):
  zero = bpe.encode(b'\0').tolist()
  assert len(zero) == 1
  apart = [bpe.encode(text.encode()).tolist() for text in texts]
  joined = list(itertools.chain(*(zero + ids for ids in apart)))[1:]
  assert bpe.encode('\0'.join(texts).encode()).tolist() == joined


# Every kind of white space, contractions, and characters whose class libraries may disagree about.
ODD = "hat's 're've\t\n\r\f\v\x1c\x85\xa0\u180e\u2028\u3000.,;!_-`{0²Ⅷ½é\u0301漢かㅎ😀\u200d"


@given(st.text(ODD), st.sampled_from([1, 2, 5]))
def test_bpe_in_pieces_has_the_tokens_of_the_whole(bpe, text, size):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tokenizers, '_PIECE', size)
    patch.setattr(tokenizers, '_PIECES', 3)
    assert ''.join(tokenizers._pieces(text)) == text
    assert bpe.encode(text).tolist() == bpe._model.encode(text).ids


@pytest.mark.parametrize('between', ['\n', '\r\n', ' ', '\t', ',', '.'])
def test_bpe_reads_text_in_short_pieces_whatever_ends_its_lines(between):
  text = between.join(['cat', 'hats2', "don't"] * 5000)
  pieces = list(tokenizers._pieces(text))
  assert ''.join(pieces) == text
  assert max(map(len, pieces)) < tokenizers._PIECE + 10
  whole = tokenizers.library('bpe').trainers.BpeTrainer(
    vocab_size=VOCABULARY, initial_alphabet=tokenizers._alphabet(), show_progress=False
  )
  model = tokenizers._byte_level(tokenizers.library('bpe').models.BPE())
  model.train_from_iterator([text], whole)
  want = [' '.join(pair) for pair in json.loads(model.to_str())['model']['merges']]
  learned = tokenizers.Bpe.train(text.encode(), VOCABULARY)
  assert learned.merges.split('\n') == want
  assert learned.encode(text).tolist() == model.encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize('between', ['\r\n', ' '])
def test_bpe_of_22_megabytes_takes_less_than_a_gigabyte(between, tmp_path):
  source = f"""
import random, resource
from sparse_lm.data import tokenizers
words = [''.join(random.choices('abcdefgh', k=random.randint(2, 9))) for _ in range(5000)]
text = {between!r}.join(' '.join(random.choices(words, k=12)) for _ in range(300_000)).encode()
assert len(text) > 20e6
tokenizers.Bpe.train(text, 512).encode(text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
  done = subprocess.run([sys.executable, '-c', source], capture_output=True, text=True, check=True)
  assert int(done.stdout) * 1024 < 1e9


@given(TEXT)
def test_a_string_and_its_bytes_have_the_same_tokens(bpe, text):
  for tokenizer in (tokenizers.Bytes(), tokenizers.Chars(''.join(sorted({*text, 'a'}))), bpe):
    assert_array_equal(tokenizer.encode(text), tokenizer.encode(text.encode()))


def test_input_that_is_not_text_is_named(bpe):
  for tokenizer in (tokenizers.Bytes(), tokenizers.Chars('ab'), bpe):
    with pytest.raises(UserError, match=r'cannot encode list; valid: a string or UTF-8 bytes'):
      tokenizer.encode([1, 2])
    with pytest.raises(UserError, match=r"character 1 \('\\ud800'\)"):
      tokenizer.encode('a\ud800')


def test_a_tokenizer_is_shown_in_one_short_line(bpe):
  shown = [repr(t) for t in (tokenizers.Bytes(), tokenizers.Chars('ab' * 3000), bpe)]
  assert shown == ['Bytes()', 'Chars(6000 tokens)', 'Bpe(270 tokens)']


def merged(word, merges):
  """One word's tokens by the definition: of all adjacent pairs, the first in `merges` goes first."""
  while len(word) > 1:
    rank, at = min((merges.get(pair, 1e9), i) for i, pair in enumerate(itertools.pairwise(word)))
    if rank == 1e9:
      break
    word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]
  return word


@given(st.text('hatis ct\n.,'))
def test_bpe_agrees_with_its_definition(bpe, text):
  merges = {tuple(line.split(' ')): rank for rank, line in enumerate(bpe.merges.split('\n'))}
  words = re.findall(
    r' ?[a-z]+| ?[^\sa-z]+|\s+(?!\S)|\s+', text
  )  # GPT-2's pattern, for these letters
  spelt = [list(word.replace(' ', 'Ġ').replace('\n', 'Ċ')) for word in words]
  want = [token for word in spelt for token in merged(word, merges)]
  alphabet = {chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))}
  made = dict.fromkeys(a + b for a, b in merges)
  number = {token: i for i, token in enumerate([*sorted(alphabet), *made])}
  assert bpe.encode(text.encode()).tolist() == [number[token] for token in want]


def test_bpe_learns_from_the_training_split_what_is_frequent(bpe):
  assert bpe.vocab_size == VOCABULARY
  first = tuple(bpe.merges.split('\n')[0].split(' '))
  words = re.findall(r' ?[A-Za-z]+', PROSE)
  counts = {
    pair: sum(list(itertools.pairwise(word)).count(pair) for word in words)
    for pair in {pair for word in words for pair in itertools.pairwise(word)}
  }
  assert counts[first] == max(counts.values())
  assert len(bpe.encode(PROSE.encode())) < len(PROSE) / 2
  again = tokenizers.build('bpe', corpus(PROSE, 'other'), VOCABULARY)
  assert again == bpe and again.digest == bpe.digest
  assert (
    tokenizers.build('bpe', corpus('ab'), VOCABULARY).vocab_size == 257
  )  # nothing left to merge
  assert tokenizers.build('bpe', corpus('\0'), VOCABULARY).vocab_size == 256


@pytest.mark.parametrize('size', [0, 256, 65536])
def test_bpe_refuses_an_invalid_vocabulary(size):
  with pytest.raises(UserError, match=rf'config\.data\.vocab_size={size} .*257 .* to 65535'):
    tokenizers.build('bpe', corpus(PROSE), size)


def test_bpe_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  for act in (
    lambda: tokenizers.build('bpe', corpus(PROSE), VOCABULARY),
    lambda: tokenizers.Bpe('a b').encode(b'ab'),
  ):
    with pytest.raises(UserError, match=r"pip install 'tokenizers>=0\.22'") as error:
      act()
    assert '\n' not in str(error.value)


def test_bpe_errors(bpe):
  with pytest.raises(UserError, match='byte 1 is not'):
    bpe.encode(b'a\xff')
  for bad in (-1, VOCABULARY):
    with pytest.raises(IndexError):
      bpe.decode([0, bad])
  assert bpe.decode([]) == '' and len(bpe.encode(b'')) == 0


@pytest.mark.skipif(
  not SHAKESPEARE.exists(),
  reason='../shared/data/tiny_shakespeare.txt is missing: place input.txt of '
  'karpathy/char-rnn data/tinyshakespeare there (1,115,394 bytes)',
)
def test_tiny_shakespeare_has_65_characters():
  tokenizer = tokenizers.build('chars', sources.files(str(SHAKESPEARE)), VOCABULARY)
  assert tokenizer.vocab_size == 65
  # The vocabulary that nanoGPT's data/shakespeare_char/prepare.py prints.
  assert tokenizer.chars.startswith("\n !$&',-.3:;?ABC") and tokenizer.chars.endswith('xyz')
