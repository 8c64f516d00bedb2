"""Tokenizers of imported models against this project's own BPE, and the library on whole texts."""

import json

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sparse_lm.core.errors import UserError
from sparse_lm.data import hf_tokenizer, tokenizers
from sparse_lm.data.corpus import Corpus
from sparse_lm.data.hf_tokenizer import HuggingFace

PROSE = 'The cat sat on the mat!\nThe cats, the hats:\n\n that is that.\n' * 3
CHAT = (
  '{{ bos_token }}{% for message in messages %}\n'
  '  {% if loop.first and message.role == "assistant" %}\n'
  '    {{ raise_exception("begins wrong") }}{% endif %}\n'
  '[{{ message.role }}] {{ message.content }}{{ eos_token }}\n'
  '{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}'
)


@pytest.fixture(scope='module')
def bpe():
  text = PROSE.encode()
  return tokenizers.build('bpe', Corpus({'train': text}, {}), 300)


@pytest.fixture(scope='module')
def model(bpe):
  """The same vocabulary and two special tokens, `<s>` before a prompt, in the library."""
  model = library.Tokenizer.from_str(bpe._model.to_str())
  model.add_special_tokens(['<s>', '</s>'])
  special = [('<s>', bpe.vocab_size)]
  model.post_processor = library.processors.TemplateProcessing('<s> $A', special_tokens=special)
  return model


@pytest.fixture(scope='module')
def imported(bpe, model):
  size = bpe.vocab_size
  return HuggingFace(model.to_str(), size + 5, size, size + 1, CHAT)


TEXT = st.lists(st.sampled_from([*' \n\t!.aZ1é漢', 'the ', ' cat\n', '</s>']), max_size=40).map(
  ''.join
)


@given(TEXT)
def test_ids_are_those_of_the_same_bpe_and_decode_to_the_text(imported, bpe, text):
  ids = imported.encode(text)
  assert imported.decode(ids) == text and ids.dtype == np.uint16
  if '</s>' not in text:
    assert_array_equal(ids, bpe.encode(text))
  else:
    assert bpe.vocab_size + 1 in ids


@given(TEXT)
def test_pieces_of_a_document_have_the_tokens_of_the_whole(imported, model, text):
  document = (text + PROSE) * 3
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hf_tokenizer, '_PIECE', 8)
    assert len(list(imported._pieces(document))) > 10
    got = imported.encode(document)
  assert_array_equal(got, model.encode(document, add_special_tokens=False).ids)


def test_documents_are_separated_by_the_last_token(imported, bpe):
  got = imported.encode(b'the\0cat\0')
  want = [*imported.encode('the'), bpe.vocab_size + 1, *imported.encode('cat'), bpe.vocab_size + 1]
  assert_array_equal(got, want)
  lone = HuggingFace(imported.contents, imported.vocab_size)
  assert lone.encode('the').size
  with pytest.raises(UserError, match='no token for the end of a text'):
    lone.encode('a\0b')


def test_a_prompt_has_the_special_tokens_that_the_tokenizer_adds(imported, bpe):
  assert_array_equal(imported.encode_prompt('the'), [bpe.vocab_size, *imported.encode('the')])
  assert_array_equal(bpe.encode_prompt('the'), bpe.encode('the'))


def test_json_round_trip(imported):
  again = tokenizers.from_json(json.loads(json.dumps(imported.to_json())))
  assert again.digest == imported.digest and again.to_json() == imported.to_json()
  assert_array_equal(again.encode_prompt('the\ncat'), imported.encode_prompt('the\ncat'))
  assert (again.bos, again.eos, again.chat_template) == (imported.bos, imported.eos, CHAT)


def test_ids_beyond_16_bits():
  words = {f'w{i}': i for i in range(2**16 + 3)}
  large = library.Tokenizer(library.models.WordLevel(words, unk_token='w0'))
  large.pre_tokenizer = library.pre_tokenizers.Whitespace()
  found = HuggingFace(large.to_str(), len(words))
  ids = found.encode('w65535 w65536 w65538')
  assert ids.dtype == np.uint32 and ids.tolist() == [65535, 65536, 65538]


def test_chat_template(imported):
  messages = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]
  assert imported.chat(messages) == '<s>[user] hi</s>\n[assistant] ho</s>\n[assistant] '
  with pytest.raises(UserError, match='begins wrong'):
    imported.chat(messages[1:])
  with pytest.raises(UserError, match='no chat template'):
    HuggingFace(imported.contents, imported.vocab_size).chat(messages)


def test_errors(imported, bpe):
  with pytest.raises(UserError, match='cannot be read'):
    HuggingFace('{}', 300)
  with pytest.raises(UserError, match=f'the model has {bpe.vocab_size + 1} rows'):
    HuggingFace(imported.contents, bpe.vocab_size + 1)
  with pytest.raises(UserError, match="it has no 'chat_template'"):
    tokenizers.from_json({'name': 'hf', 'tokenizer': {}})
  with pytest.raises(UserError, match=r"tokenizer='hf' is the tokenizer of an imported model"):
    tokenizers.build('hf', Corpus({'train': b'a'}, {}), 300)
  with pytest.raises(IndexError):
    imported.decode([imported.vocab_size])
  assert imported.decode([imported.vocab_size - 1]) == ''  # a row of padding


def test_limits_of_a_former_use_neither_cut_nor_pad_a_text(imported, model):
  limited = library.Tokenizer.from_str(model.to_str())
  limited.enable_truncation(4)
  limited.enable_padding(length=500)
  saved = HuggingFace(limited.to_str(), imported.vocab_size, imported.bos, imported.eos)
  assert_array_equal(saved.encode(PROSE), imported.encode(PROSE))
  assert_array_equal(saved.encode_prompt(PROSE), imported.encode_prompt(PROSE))
