"""Loading a model for inference, from a workdir or from a packed folder."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError, require, unknown
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.data.pipeline import Data
from sparse_lm.evals import DEFAULT, SIZES, EvalData, EvalModel, Windows
from sparse_lm.inference.pack import PackedModel, dense_twin
from sparse_lm.model.lm import LM
from sparse_lm.runs import configs, packed_folder, trained
from sparse_lm.runs.configs import Overrides
from sparse_lm.runs.packed_folder import Saved
from sparse_lm.runs.setup import data_of, text_of
from sparse_lm.runs.trained import Trained
from sparse_lm.runs.workdir import check_text

# Fields that name another text to evaluate on.
OTHER_TEXT = ('data.path', 'data.source', 'data.split')


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

  def data(self, text: Overrides | None = None) -> Data:
    """Returns a text as tokens of the model.

    Args:
      text: fields of `config.data` that name another text, such as `{'data.path': 'other.txt'}`; a path
        alone names files. By default, the text is the one that the model was trained on.

    Raises UserError if the text cannot be read, and if it is not the text of training but should be.
    """
    if text:
      return text_of(self._other(text), self.tokenizer)
    data = data_of(self.config, self.tokenizer)
    if self.packed is None:
      check_text(self.origin.folder, data, '--workdir')
    elif data.tokenizer.digest != self.tokenizer.digest:
      raise UserError(
        f'--workdir={self.path} was trained on other tokens than config.data now makes of its text; '
        'valid: the text that it was trained on'
      )
    return data

  def _other(self, text: Overrides) -> ConfigDict:
    """Returns the config with another text."""
    for field in text:
      if field not in OTHER_TEXT:
        valid = [f'config.{name}' for name in OTHER_TEXT]
        raise unknown('field to override here', f'config.{field}', valid)
    source = {'data.source': 'files'} if 'data.path' in text else {}
    return configs.derive(self.config, source | dict(text), allowed=('data',))

  def eval_model(self) -> EvalModel:
    """Returns the model as evaluations take it; a packed model with its dense twin."""
    twin = self.packed and dense_twin(self.model)
    return EvalModel(self.model, self.variables, self.packed, twin, self.tokenizer)

  def eval_data(
    self, split: str | None, windows: Windows = DEFAULT, text: Overrides | None = None
  ) -> EvalData:
    """Returns a split of a text.

    Args:
      split: its name; `None` gives no tokens, for evaluations that read no text.
      windows: how much of the split is read, and in which windows.
      text: another text than that of training; see `data`.

    Raises UserError for an unknown split, for windows that the model cannot read, and as `data` does.
    """
    own, most = self.config.data, self.model.spec.context
    for name, number in windows._asdict().items():
      if number is not None:
        SIZES[name].require(name, number)
    context = windows.context or own.context
    require(context <= most, 'context', context, f'1 to {most}, the positions of the model')
    stride = windows.stride or context
    require(stride <= context, 'stride', stride, f'1 to {context}, the context')
    if split is None:
      return EvalData(np.empty(0, np.int32), context, windows.batch or own.batch, progress=True)
    data = EvalData.of_split(self.data(text), split, windows)
    return dataclasses.replace(data, progress=True)


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
