"""Loading a model for inference, from a workdir or from a packed folder."""

import dataclasses

from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.data.pipeline import Data
from sparse_lm.evals import EvalData, EvalModel
from sparse_lm.inference.pack import PackedModel, dense_twin
from sparse_lm.model.lm import LM
from sparse_lm.runs import packed_folder, trained
from sparse_lm.runs.packed_folder import Saved
from sparse_lm.runs.setup import data_of
from sparse_lm.runs.trained import Trained
from sparse_lm.runs.workdir import check_text


@dataclasses.dataclass(frozen=True, repr=False)
class Runnable:
  """A model with its variables, config and tokenizer.

  Attributes:
    path: the folder that it was loaded from.
    origin: the contents of that folder: a run, or a packed model.
    variables: all collections of variables. A packed model has the collection `packed` in place of most
      parameters.
    packed: the packed model, `None` if `path` is a workdir.
  """

  path: str
  origin: Trained | Saved
  model: LM
  variables: Tree
  packed: PackedModel | None = None

  @property
  def source(self) -> str:
    """The folder and the checkpoint, in words."""
    return self.origin.source

  @property
  def config(self) -> ConfigDict:
    """The run's config."""
    return self.origin.config

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The run's tokenizer."""
    return self.origin.tokenizer

  def __repr__(self) -> str:
    spec = self.model.spec
    return f'Runnable({self.path!r}, {spec.layers} layers of width {spec.width}, {self.tokenizer})'

  def data(self) -> Data:
    """Returns the text that the model was trained on, as tokens. Raises UserError if it has changed."""
    data = data_of(self.config)
    if self.packed is None:
      check_text(self.origin.folder, data, '--workdir')
    elif data.tokenizer.digest != self.tokenizer.digest:
      raise UserError(
        f'--workdir={self.path} was trained on other tokens than config.data now makes of its text; '
        'valid: the text that it was trained on'
      )
    return data

  def eval_model(self) -> EvalModel:
    """Returns the model as evaluations take it; a packed model with its dense twin."""
    twin = self.packed and dense_twin(self.model)
    return EvalModel(self.model, self.variables, self.packed, twin)

  def eval_data(self, split: str, batch: int | None = None) -> EvalData:
    """Returns a split of the text that the model was trained on.

    Args:
      split: its name.
      batch: sequences that are evaluated together, by default `config.data.batch`.

    Raises UserError for an unknown split, and as `data` does.
    """
    data = EvalData.of_split(self.data(), split)
    return dataclasses.replace(data, batch=batch or data.batch, progress=True)


def load(path: str) -> Runnable:
  """Loads a packed folder, the newest checkpoint of a workdir, or its best one from `<workdir>/best`.

  Raises UserError if the folder holds neither a packed model nor a checkpoint.
  """
  if packed_folder.is_saved(path):
    found = packed_folder.load(path)
    packed = found.packed
    return Runnable(path, found, packed.model, packed.variables, packed)
  run = trained.load(path)
  return Runnable(path, run, run.program.model, {'params': run.params, **run.model_state})
