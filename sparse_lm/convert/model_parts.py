"""Opens the model of a workdir; weight files are read one part at a time."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree
from sparse_lm.data import tokenizers
from sparse_lm.runs import configs, trained
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, folder_of, read_config
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import read_json
from sparse_lm.train.work import Work


@dataclasses.dataclass(frozen=True)
class ModelParts:
  """A model whose parts are read one at a time; see `runs.weight_files`.

  Attributes:
    config: its config. `config.data.vocab_size` is the number of its tokenizer's tokens.
    tokenizer: its tokenizer.
    parts: the numbers of its layers, and `None` for the parameters outside them.
    read: a function from a part to its parameters and masks.
    model_state: its other collections, such as calibrated thresholds.
    source: where the weights come from, in words.
    step: optimizer steps that the weights had been trained for.
    work: FLOPs that training had spent.
  """

  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  parts: list[int | None]
  read: Callable[[int | None], tuple[Tree, Tree]]
  model_state: Tree
  source: str
  step: int
  work: Work


def open_workdir(workdir: str) -> ModelParts:
  """Opens the model of a workdir. Raises UserError as `runs.trained.load` does."""
  folder, _ = folder_of(workdir)
  if (folder / WEIGHTS).is_dir() and (folder / CONFIG).exists():
    config = configs.of_run(read_config(folder), folder / CONFIG)
    tokenizer = tokenizers.from_json(read_json(folder / 'tokenizer.json'))
    files = WeightFiles(folder / WEIGHTS)
    weights = files.parts, files.read, files.model_state
    source = f'{folder}: {files.source}', files.step, files.work
  else:
    run = trained.load(workdir)
    config, tokenizer = run.config, run.tokenizer

    def read(part: int | None) -> tuple[Tree, Tree]:
      return _only(part, run.params), _only(part, run.masks)

    weights = [None, *range(config.model.layers)], read, run.model_state
    source = run.source, run.step, run.work
  config = config.copy_and_resolve_references().unlock()
  config.data.vocab_size = tokenizer.vocab_size
  return ModelParts(config.lock(), tokenizer, *weights, *source)


def _only(part: int | None, tree: Tree) -> Tree:
  """Returns the subtrees of a part."""
  return {name: node for name, node in tree.items() if Place.parse(name).layer == part}
