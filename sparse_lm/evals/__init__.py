"""Evaluations: each file defines one subclass of `Evaluation`, which is found by the file's name.

The fields of the class are its options, and `run` returns metrics of a model on data.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from tqdm import tqdm

from sparse_lm.core import discovery
from sparse_lm.core.tree import Tree
from sparse_lm.data import pipeline
from sparse_lm.data.pipeline import Data
from sparse_lm.inference.pack import PackedModel
from sparse_lm.model.lm import LM

Values = dict[str, float | int | None]  # metrics by name; `None` if it cannot be measured here


@dataclasses.dataclass(frozen=True, repr=False)
class EvalModel:
  """A model to evaluate.

  Attributes:
    model: the model.
    variables: all collections that the model reads, packed or not.
    packed: the packed model; `None` if the model is not packed.
    twin: the dense twin that a packed model is compared with; `None` if it is not packed.
  """

  model: LM
  variables: Tree
  packed: PackedModel | None = None
  twin: PackedModel | None = None

  @classmethod
  def of_packed(cls, packed: PackedModel, twin: PackedModel) -> 'EvalModel':
    """Returns a packed model and its dense twin as an `EvalModel`."""
    return cls(packed.model, packed.variables, packed, twin)


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
  """

  tokens: np.ndarray
  context: int
  batch: int = 1
  split: str = 'validation'
  bytes_per_token: float | None = None
  components: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  progress: bool = False

  @classmethod
  def of_split(cls, data: Data, split: str = 'validation') -> 'EvalData':
    """Returns a split of a run's data. Raises a UserError if the split is unknown."""
    components = {name: tokens for name, tokens in data.components(split).items() if name}
    ratio = data.card['bytes_per_token'].get(split)
    return cls(data.tokens[split], data.context, data.batch, split, ratio, components)

  def passes(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields batches with every prediction once: component ('' outside mixtures), tokens, weights.

    `data.pipeline.eval_batches` documents the two arrays and the errors.
    """
    parts = self.components or {'': self.tokens}
    step = self.context * self.batch
    with tqdm(
      total=sum(-(-(len(tokens) - 1) // step) for tokens in parts.values()),
      desc=self.split,
      unit='batch',
      leave=False,
      disable=None if self.progress else True,  # None disables it unless stderr is a terminal
    ) as bar:
      for name, tokens in parts.items():
        batches = pipeline.eval_batches(
          tokens, context=self.context, batch=self.batch, split=self.split
        )
        for tokens_BxL1, weight_BxL in batches:
          yield name, tokens_BxL1, weight_BxL
          bar.update()


class Evaluation(abc.ABC):
  """The base class of all evaluations."""

  @abc.abstractmethod
  def run(self, model: EvalModel, data: EvalData) -> Values:
    """Returns metrics by name.

    Raises:
      UserError: the evaluation does not work with this model or these data.
    """


def names() -> list[str]:
  """Returns the names of all evaluations."""
  return discovery.names(__name__)


def evaluation(name: str) -> type[Evaluation]:
  """Returns the class in `evals/<name>.py`. Raises a UserError if there is none."""
  return discovery.load(__name__, name, 'evaluation')
