"""Evaluations: one file each, found by name.

A file defines one subclass of `Evaluation`. Its fields are its options, and `run` turns a model and data
into numbers by name.
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

Values = dict[str, float | int | None]  # what cannot be measured here is `None`


@dataclasses.dataclass(frozen=True, repr=False)
class EvalModel:
  """A model to evaluate.

  Attributes:
    variables: all collections that the model reads, packed or not.
    packed: the same model as it was packed, `None` where it is not.
    twin: what a packed model is timed beside, `None` where it is not.
  """

  model: LM
  variables: Tree
  packed: PackedModel | None = None
  twin: PackedModel | None = None

  @classmethod
  def of_packed(cls, packed: PackedModel, twin: PackedModel) -> 'EvalModel':
    """A packed model, and what it is timed beside."""
    return cls(packed.model, packed.variables, packed, twin)


@dataclasses.dataclass(frozen=True, repr=False)
class EvalData:
  """A split of a corpus, in tokens.

  Attributes:
    tokens: 1-D, of the whole split.
    context: tokens of a sequence.
    batch: sequences that are evaluated together.
    split: its name.
    bytes_per_token: mean over the split, `None` where the tokens stand for no text.
    components: of a mixture, the 1-D tokens of each component by name.
    progress: whether `passes` shows a bar, where stderr is a terminal.
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
    """A split of a run's data. Raises UserError for an unknown split."""
    components = {name: tokens for name, tokens in data.components(split).items() if name}
    ratio = data.card['bytes_per_token'].get(split)
    return cls(data.tokens[split], data.context, data.batch, split, ratio, components)

  def passes(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every prediction of the split once: a component's name ('' without any), tokens and weights.

    See `data.pipeline.eval_batches` for the two arrays, and for what is raised.
    """
    parts = self.components or {'': self.tokens}
    step = self.context * self.batch
    with tqdm(
      total=sum(-(-(len(tokens) - 1) // step) for tokens in parts.values()),
      desc=self.split,
      unit='batch',
      leave=False,
      disable=None if self.progress else True,  # None: only where stderr is no terminal
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
    """Numbers by name.

    Raises UserError where the model or the data do not allow the evaluation.
    """


def names() -> list[str]:
  """The names of all evaluations."""
  return discovery.names(__name__)


def evaluation(name: str) -> type[Evaluation]:
  """The class in `evals/<name>.py`. Raises UserError where there is none."""
  return discovery.load(__name__, name, 'evaluation')
