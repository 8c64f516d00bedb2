"""Tokenizers of imported models, which the library `tokenizers` runs as they are."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TypedDict

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from sparse_lm.core import records
from sparse_lm.core.errors import UserError
from sparse_lm.data.tokenizer_base import SavedTokenizer, as_utf8, in_vocabulary, library

if TYPE_CHECKING:
  import tokenizers

KIND = 'hf'  # the kind in `config.data.tokenizer`
# Byte-level tokenizers end a word at a line break between a visible character and a letter. A document is
# cut only there, so that the tokens of its parts are those of the whole.
_LINE_BREAK = re.compile(r'(?<=\S\n)(?=[A-Za-z])')
_PIECE = 2**16  # length of a piece in characters, extended to the next such line break
_PIECES = 16  # pieces that are encoded at once


class _Special(TypedDict):
  bos: int | None
  eos: int | None


class _Saved(TypedDict):
  """The contents of a workdir's tokenizer.json."""

  name: str
  tokenizer: dict[str, object]
  special: _Special
  chat_template: str | None
  vocab_size: int


@dataclasses.dataclass(frozen=True, repr=False)
class HuggingFace(SavedTokenizer):
  """A tokenizer of the Hugging Face library.

  A document of a text ends with the zero byte or with the text. Its tokens contain no special tokens
  except those that the text spells out. The zero byte becomes the token `eos` (without one `bos`).

  Attributes:
    contents: the JSON text of the library, the contents of a model's tokenizer.json.
    vocab_size: rows of the model's embedding, which may be more than the tokenizer's tokens.
    bos: id of the token that begins a text, or `None`.
    eos: id of the token that ends a text, or `None`.
    chat_template: a Jinja template that formats the messages of a conversation, or `None`.

  Raises UserError if the library cannot read the contents, or if an id is outside the vocabulary.
  """

  contents: str
  vocab_size: int
  bos: int | None = None
  eos: int | None = None
  chat_template: str | None = None

  def __post_init__(self) -> None:
    valid = 'a tokenizer.json that the library tokenizers writes'
    try:
      size = self._model.get_vocab_size()
    except UserError:
      raise
    except Exception as error:  # the library raises plain exceptions
      raise UserError(f'the tokenizer cannot be read ({error}); valid: {valid}') from None
    largest = max([*self._model.get_vocab().values(), self.bos or 0, self.eos or 0], default=0)
    if not size or largest >= self.vocab_size:
      raise UserError(
        f'the tokenizer has {size} tokens with ids up to {largest}, and the model has {self.vocab_size} '
        'rows of embeddings; valid: the tokenizer of this model'
      )

  @classmethod
  def from_json(cls, saved: records.Json) -> 'HuggingFace':
    """Restores a tokenizer from the result of `to_json`. Raises ValueError if its fields are missing."""
    records.check(saved, _Saved)
    contents = json.dumps(saved['tokenizer'], ensure_ascii=False)
    special = saved['special']
    sizes = saved['vocab_size'], special['bos'], special['eos']
    return cls(contents, *sizes, saved['chat_template'])

  def to_json(self) -> _Saved:
    return {
      'name': KIND,
      'tokenizer': json.loads(self.contents),
      'special': {'bos': self.bos, 'eos': self.eos},
      'chat_template': self.chat_template,
      'vocab_size': self.vocab_size,
    }

  @property
  def dtype(self) -> np.dtype:
    """The smallest unsigned integer type that holds all ids."""
    return np.min_scalar_type(self.vocab_size - 1)

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the tokens of a text in `dtype`. Raises UserError if `text` is not UTF-8."""
    found = [np.empty(0, self.dtype)]
    text = as_utf8(text)
    options = {'delay': 2, 'leave': False, 'unit_scale': True, 'disable': None}
    with tqdm(total=len(text), desc='encoding', **options) as bar:
      for number, document in enumerate(text.split('\0')):
        if number:
          found.append(np.array([self._separator], self.dtype))
        pieces = self._pieces(document)
        while batch := list(itertools.islice(pieces, _PIECES)):
          encoded = self._model.encode_batch_fast(batch, add_special_tokens=False)
          ids = itertools.chain.from_iterable(piece.ids for piece in encoded)
          found.append(np.fromiter(ids, self.dtype))
          bar.update(sum(map(len, batch)))
    return np.concatenate(found)

  def encode_prompt(self, text: str | bytes) -> np.ndarray:
    """Returns the tokens of a prompt with the special tokens that the tokenizer adds, such as `bos`."""
    return np.array(self._model.encode(as_utf8(text)).ids, self.dtype)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of 1-D `ids`, special tokens included; ids without a token give no text.

    Raises:
      IndexError: an id is outside the vocabulary.
    """
    return self._model.decode(in_vocabulary(ids, self.vocab_size), skip_special_tokens=False)

  def chat(self, messages: Sequence[dict[str, str]]) -> str:
    """Returns the prompt for the next message of a conversation, special tokens included.

    Args:
      messages: dicts with `role` ('system', 'user' or 'assistant') and `content`.

    Raises UserError if there is no chat template, or if it fails.
    """
    if self.chat_template is None:
      raise UserError('the tokenizer has no chat template; valid: a prompt without one')
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals['raise_exception'] = _refuse
    names = {'bos_token': self.bos_text, 'eos_token': self.eos_text}
    try:
      template = environment.from_string(self.chat_template)
      return template.render(messages=list(messages), add_generation_prompt=True, **names)
    except TemplateError as error:
      raise UserError(f'the chat template fails ({error}); valid: other messages') from None

  @property
  def bos_text(self) -> str:
    """The text of the token `bos`, '' without one."""
    return self._text(self.bos)

  @property
  def eos_text(self) -> str:
    """The text of the token `eos`, '' without one."""
    return self._text(self.eos)

  def _text(self, token: int | None) -> str:
    return '' if token is None else self._model.id_to_token(token) or ''

  @functools.cached_property
  def _separator(self) -> int:
    """The token between documents."""
    for token in (self.eos, self.bos):
      if token is not None:
        return token
    raise UserError(
      'the tokenizer has no token for the end of a text, and the text has several documents; valid: a '
      'text in one file'
    )

  @functools.cached_property
  def _model(self) -> 'tokenizers.Tokenizer':
    model = library(KIND).Tokenizer.from_str(self.contents)
    # A file may hold the limits of a former use, which would cut or pad texts.
    model.no_truncation()
    model.no_padding()
    return model

  @functools.cached_property
  def _cuts(self) -> bool:
    """Whether a document may be cut at some line breaks: its words are those of a byte-level BPE."""
    saved = json.loads(self.contents)
    normalizer = saved.get('normalizer') or {'type': 'NFC'}
    words = json.dumps(saved.get('pre_tokenizer'))
    adds_space = '"add_prefix_space": true' in words  # at the beginning of every piece
    return normalizer.get('type') == 'NFC' and 'ByteLevel' in words and not adds_space

  def _pieces(self, document: str) -> Iterator[str]:
    """Yields pieces of a document whose tokens together are those of the document."""
    start = 0
    while start < len(document):
      end = _LINE_BREAK.search(document, start + _PIECE) if self._cuts else None
      stop = end.start() if end else len(document)
      yield document[start:stop]
      start = stop


def _refuse(message: str) -> NoReturn:
  raise TemplateError(message)
