"""A model to run, from a trained workdir or a packed folder alike."""

import dataclasses

from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.data.pipeline import Data
from sparse_lm.inference.pack import PackedModel
from sparse_lm.model.lm import LM
from sparse_lm.runs import packed_folder, trained
from sparse_lm.runs.run_folder import folder_of
from sparse_lm.runs.setup import data_of
from sparse_lm.runs.workdir import check_text


@dataclasses.dataclass(frozen=True, repr=False)
class Runnable:
  """What decoding needs.

  Attributes:
    source: which folder and checkpoint it is, in words.
    variables: all collections; of a packed folder with `packed` in place of most parameters.
    packed: the model of a packed folder as it was packed, `None` of any other.
  """

  path: str
  source: str
  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  model: LM
  variables: Tree
  packed: PackedModel | None = None

  def __repr__(self) -> str:
    spec = self.model.spec
    return f'Runnable({self.path!r}, {spec.layers} layers of width {spec.width}, {self.tokenizer})'

  def data(self) -> Data:
    """The text that the model was trained on, in its tokens. Raises UserError where it has changed."""
    data = data_of(self.config)
    if self.packed is None:
      check_text(folder_of(self.path)[0], data, '--workdir')
    elif data.tokenizer.digest != self.tokenizer.digest:
      raise UserError(
        f'--workdir={self.path} was trained on other tokens than config.data now makes of its text; '
        'valid: the text that it was trained on'
      )
    return data


def load(path: str) -> Runnable:
  """Loads a packed folder, a workdir (its newest checkpoint) or `<workdir>/best`.

  Raises UserError where the folder holds neither a packed model nor a checkpoint.
  """
  if packed_folder.is_saved(path):
    found = packed_folder.load(path)
    packed = found.packed
    return Runnable(
      path, found.source, found.config, found.tokenizer, packed.model, packed.variables, packed
    )
  run = trained.load(path)
  variables = {'params': run.params, **run.model_state}
  return Runnable(path, run.source, run.config, run.tokenizer, run.program.model, variables)
