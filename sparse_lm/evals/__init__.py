"""Evaluations: each file defines one subclass of `Evaluation`, which is found by the file's name.

The fields of the class are its options, and `run` returns metrics of a model on data.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from tqdm import tqdm

from sparse_lm.core import discovery
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.data import one_pass
from sparse_lm.data.pipeline import Data
from sparse_lm.data.tokenizers import Tokenizer
from sparse_lm.inference.pack import PackedModel
from sparse_lm.model.lm import LM

Values = dict[str, float | int | None]  # metrics by name; `None` if it cannot be measured here
Option = str | int


def option(default: Option, meaning: str, valid: Range | None = None) -> Option:
  """Returns a field of an evaluation that is also an argument of `python -m sparse_lm.evaluate`.

  Args:
    default: its default.
    meaning: its help text.
    valid: its range if it is a number.
  """
  return dataclasses.field(default=default, metadata={'help': meaning, 'range': valid})


@dataclasses.dataclass(frozen=True, repr=False)
class EvalModel:
  """A model to evaluate.

  Attributes:
    model: the model.
    variables: all collections that the model reads, packed or not.
    packed: the packed model; `None` if the model is not packed.
    twin: the dense twin that a packed model is compared with; `None` if it is not packed.
    tokenizer: the run's tokenizer; `None` if its tokens are not text.
  """

  model: LM
  variables: Tree
  packed: PackedModel | None = None
  twin: PackedModel | None = None
  tokenizer: Tokenizer | None = None

  @classmethod
  def of_packed(cls, packed: PackedModel, twin: PackedModel) -> 'EvalModel':
    """Returns a packed model and its dense twin as an `EvalModel`."""
    return cls(packed.model, packed.variables, packed, twin)


class Windows(NamedTuple):
  """The part of a split that is read, and the windows that it is cut into; `None` = the default.

  Attributes:
    context: tokens per window; by default `config.data.context`.
    stride: distance between the starts of windows in tokens; by default `context`. After the first
      window, every prediction reads more than `context - stride` tokens.
    max_tokens: number of tokens that are read from the beginning of the split, or of each component of a
      mixture; by default all.
    batch: windows that are evaluated together; by default `config.data.batch`.
  """

  context: int | None = None
  stride: int | None = None
  max_tokens: int | None = None
  batch: int | None = None


DEFAULT = Windows()
# The ranges of the fields of `Windows`, which a model may limit further.
SIZES = {
  'context': Range(int, '[1, 2^24]'),
  'stride': Range(int, '[1, 2^24]'),
  'max_tokens': Range(int, '[2, 2^40]'),
  'batch': Range(int, '[1, 2^24]'),
}


@dataclasses.dataclass(frozen=True, repr=False)
class EvalData:
  """A tokenized split of a corpus.

  Attributes:
    tokens: the 1-D tokens of the whole split.
    context: tokens per sequence.
    batch: number of sequences that are evaluated together.
    split: name of the split.
    bytes_per_token: mean over the split; `None` if the tokens are not text.
    components: for a mixture, the 1-D tokens of each component by name.
    progress: whether `passes` shows a progress bar if stderr is a terminal.
    stride: distance between the starts of windows in tokens; `None` means `context`.
    card: JSON values that describe the text and its windows.
  """

  tokens: np.ndarray
  context: int
  batch: int = 1
  split: str = 'validation'
  bytes_per_token: float | None = None
  components: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  progress: bool = False
  stride: int | None = None
  card: JsonObject = dataclasses.field(default_factory=dict)

  @classmethod
  def of_split(
    cls, data: Data, split: str = 'validation', windows: Windows = DEFAULT
  ) -> 'EvalData':
    """Returns a split of a run's data. Raises a UserError if the split is unknown."""
    end = windows.max_tokens
    parts = {name: tokens[:end] for name, tokens in data.components(split).items()}
    tokens = data.tokens[split][:end]
    ratio = data.card['bytes_per_token'].get(split)
    if ratio and len(tokens) < len(data.tokens[split]):
      read = [data.tokenizer.decode(part) for part in parts.values()]
      ratio = sum(len(text.encode()) for text in read) / sum(map(len, parts.values()))
    context = windows.context or data.context
    stride = windows.stride or context
    card = data.evaluation(split) | {
      'tokenizer': data.card['tokenizer'],
      'context': context,
      'stride': stride,
      'tokens': len(tokens),
      'predictions': sum(len(part) - 1 for part in parts.values()),
    }
    card.pop('unit')  # each evaluation has its own
    components = {name: part for name, part in parts.items() if name}
    batch = windows.batch or data.batch
    return cls(tokens, context, batch, split, ratio, components, stride=stride, card=card)

  @property
  def parts(self) -> Mapping[str, np.ndarray]:
    """The tokens that `passes` reads, by component ('' outside mixtures)."""
    return self.components or {'': self.tokens}

  def passes(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields batches that have every prediction once: component ('' if no mixture), tokens, weights.

    `data.one_pass.eval_batches` documents the two arrays and the errors.
    """
    parts, stride = self.parts, self.stride or self.context
    windows = [one_pass.windows(len(part) - 1, self.context, stride) for part in parts.values()]
    with tqdm(
      total=sum(-(-count // self.batch) for count in windows),
      desc=self.split,
      unit='batch',
      leave=False,
      disable=None if self.progress else True,  # None disables it unless stderr is a terminal
    ) as bar:
      for name, tokens in parts.items():
        batches = one_pass.eval_batches(
          tokens, context=self.context, batch=self.batch, split=self.split, stride=stride
        )
        for tokens_BxL1, weight_BxL in batches:
          yield name, tokens_BxL1, weight_BxL
          bar.update()


class Evaluation(abc.ABC):
  """The base class of all evaluations.

  Attributes:
    reads_text: whether `run` reads the text of the data; if it is False, the data may have no tokens.
  """

  reads_text: ClassVar[bool] = True

  @abc.abstractmethod
  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns metrics by name.

    Raises:
      UserError: the evaluation does not work with this model or these data.
    """

  def card(self, model: EvalModel, data: EvalData) -> JsonObject:
    """Returns JSON values that say what the metrics of `run` were measured on."""
    return data.card


def names() -> list[str]:
  """Returns the names of all evaluations."""
  return discovery.names(__name__)


def evaluation(name: str) -> type[Evaluation]:
  """Returns the class in `evals/<name>.py`. Raises a UserError if there is none."""
  return discovery.load(__name__, name, 'evaluation')
