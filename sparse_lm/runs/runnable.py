"""A model to run, from a trained workdir or a packed folder alike."""

import dataclasses

from ml_collections import ConfigDict

from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.model.lm import LM
from sparse_lm.runs import packed_folder, trained


@dataclasses.dataclass(frozen=True, repr=False)
class Runnable:
  """What decoding needs.

  Attributes:
    source: which folder and checkpoint it is, in words.
    variables: all collections; of a packed folder with `packed` in place of most parameters.
  """

  path: str
  source: str
  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  model: LM
  variables: Tree

  def __repr__(self) -> str:
    spec = self.model.spec
    return f'Runnable({self.path!r}, {spec.layers} layers of width {spec.width}, {self.tokenizer})'


def load(path: str) -> Runnable:
  """Loads a packed folder, a workdir (its newest checkpoint) or `<workdir>/best`.

  Raises UserError where the folder holds neither a packed model nor a checkpoint.
  """
  if packed_folder.is_saved(path):
    found = packed_folder.load(path)
    packed = found.packed
    return Runnable(
      path, found.source, found.config, found.tokenizer, packed.model, packed.variables
    )
  run = trained.load(path)
  variables = {'params': run.params, **run.model_state}
  return Runnable(path, run.source, run.config, run.tokenizer, run.program.model, variables)
