import hashlib
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.core.errors import UserError
from sparse_lm.data import sources, tokenizers

SHAKESPEARE = pathlib.Path(__file__).parents[2].parent / 'shared' / 'data' / 'tiny_shakespeare.txt'
TEXT = st.text(st.characters(exclude_categories=['Cs']))  # surrogates are not text


def corpus(train, validation='', test=''):
  texts = {'train': train, 'validation': validation, 'test': test}
  return sources.Corpus({name: text.encode() for name, text in texts.items()}, {})


@given(TEXT)
def test_bytes(text):
  tokenizer = tokenizers.build('bytes', corpus(text))
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
  tokenizer = tokenizers.build('chars', corpus(train, validation, test))
  vocabulary = sorted(set(train + validation + test))
  assert tokenizer.vocab_size == len(vocabulary)
  for text in (train, validation, test):
    ids = tokenizer.encode(text.encode())
    assert ids.ndim == 1 and ids.tolist() == [vocabulary.index(character) for character in text]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(('size', 'dtype'), [(256, np.uint8), (257, np.uint16)])
def test_chars_use_the_smallest_type(size, dtype):
  text = ''.join(map(chr, range(size)))
  ids = tokenizers.build('chars', corpus(text)).encode(text.encode())
  assert ids.dtype == dtype and ids.tolist() == list(range(size))


def test_the_document_separator_is_a_character():
  tokenizer = tokenizers.build('chars', corpus('b\0a'))
  assert tokenizer.encode(b'a\0b').tolist() == [1, 0, 2]


@given(TEXT.filter(bool))
def test_json_round_trip(text):
  for name in tokenizers.NAMES:
    tokenizer = tokenizers.build(name, corpus(text))
    again = tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer and again.digest == tokenizer.digest
    assert len(tokenizer.digest) == 64


def test_digest_tells_vocabularies_apart():
  three = [tokenizers.Bytes(), tokenizers.Chars('ab'), tokenizers.Chars('ac')]
  assert len({tokenizer.digest for tokenizer in three}) == 3
  canonical = b'{"chars":"ab","name":"chars"}'
  assert three[1].digest == hashlib.sha256(canonical).hexdigest()


def test_errors():
  with pytest.raises(UserError, match=r"config\.data\.tokenizer 'char': did you mean 'chars'"):
    tokenizers.build('char', corpus('a'))
  with pytest.raises(UserError, match="unknown tokenizer 'bpe'"):
    tokenizers.from_json({'name': 'bpe'})
  chars = tokenizers.build('chars', corpus('ab'))
  with pytest.raises(UserError, match=r"no token for 'é' \(U\+00E9\)"):
    chars.encode('abé'.encode())
  with pytest.raises(UserError, match='byte 1 is not'):
    chars.encode(b'a\xff')
  with pytest.raises(IndexError):
    chars.decode([2])
  for size in (0, 65536):
    with pytest.raises(UserError, match=rf'found {size} different characters'):
      tokenizers.Chars('x' * size)


@pytest.mark.skipif(
  not SHAKESPEARE.exists(),
  reason='../shared/data/tiny_shakespeare.txt is missing: place input.txt of '
  'karpathy/char-rnn data/tinyshakespeare there (1,115,394 bytes)',
)
def test_tiny_shakespeare_has_65_characters():
  tokenizer = tokenizers.build('chars', sources.files(str(SHAKESPEARE)))
  assert tokenizer.vocab_size == 65
  # The vocabulary that nanoGPT's data/shakespeare_char/prepare.py prints.
  assert tokenizer.chars.startswith("\n !$&',-.3:;?ABC") and tokenizer.chars.endswith('xyz')
