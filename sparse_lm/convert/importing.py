"""Converts a pretrained model of another library to a workdir."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sparse_lm.convert import gguf_file, hf_folder
from sparse_lm.convert.family import Tensors
from sparse_lm.convert.fields import Fields
from sparse_lm.convert.foreign import Foreign
from sparse_lm.convert.methods import Overrides
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.paths import Place
from sparse_lm.inference.pack import nested
from sparse_lm.layers.spec import LEARNED
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.environment import environment
from sparse_lm.runs.run_folder import CONFIG, WEIGHTS, with_format
from sparse_lm.runs.weight_files import WeightFiles
from sparse_lm.runs.workdir import check_new, whole_folder, write_json

BFLOAT16 = 'bfloat16'
BATCH = 8  # the value of `config.data.batch` of an imported model
# The fields of `config.data` of an imported model, which names no text.
_NO_TEXT = {'data.source': 'files', 'data.path': '', 'data.tokenizer': 'hf', 'data.batch': BATCH}


@dataclasses.dataclass(frozen=True)
class Imported:
  """A pretrained model with its config, parameter shapes and tensors in this project.

  Attributes:
    foreign: the model on disk.
    config: its config in this project.
    shapes: the shape structs of its parameters in this project, by path.
    tensors: for each part of the model (`WeightFiles.parts`), its groups of foreign tensors.
  """

  foreign: Foreign
  config: ConfigDict
  shapes: dict[str, tree.Tree]
  tensors: dict[int | None, list[Tensors]]


def convert(path: str, out: str, dtype: str = '', context: int = 0) -> Imported:
  """Converts a pretrained model to a new workdir.

  Args:
    path: a folder of Hugging Face, or a .gguf file.
    out: the new workdir.
    dtype: 'float32' or 'bfloat16', in which the weights are stored; '' means bfloat16 if all matrices
      are stored in it, else float32.
    context: `config.data.context`; 0 means as many tokens as the model has positions.

  Raises UserError, before anything is written, if the model is not supported.
  """
  check_new(out, '--out')
  imported = prepare(path, dtype, context)
  tokenizer = imported.foreign.tokenizer(imported.config.data.vocab_size)
  with whole_folder(out) as folder:
    write_json(folder / CONFIG, with_format(configs.to_json(imported.config)))
    write_json(folder / 'env.json', environment())
    write_json(folder / 'tokenizer.json', tokenizer.to_json())
    files = WeightFiles(folder / WEIGHTS, imported.config.model.layers)
    for part in tqdm(
      files.parts, desc='converting', unit='layer', delay=2, leave=False, disable=None
    ):
      files.write(part, nested(dict(_part(imported, part))), {})
    files.finish(f'weights imported from {path}')
  return imported


def prepare(path: str, dtype: str = '', context: int = 0) -> Imported:
  """Reads the config of a pretrained model and checks its tensors; see `convert`."""
  foreign = _read(pathlib.Path(path))
  fields = Fields(foreign.config, foreign.where)
  overrides = foreign.family.read(fields)
  fields.finish()
  overrides |= _NO_TEXT | _context(overrides, context)
  matrices = {one.dtype for one in foreign.stored.values() if len(one.shape) > 1}
  overrides['model.weights_dtype'] = dtype or (
    BFLOAT16 if matrices == {jnp.dtype(BFLOAT16)} else 'float32'
  )
  config = configs.load(str(configs.BASE), overrides)
  shapes = tree.named(plan_of(lm.from_config(config, config.data.vocab_size)).params)
  groups = list(foreign.family.tensors(config))
  expected = {}
  for group in groups:
    empty = [np.broadcast_to(np.False_, shapes[path].shape) for path in group.ours]
    expected |= {n: array.shape for n, array in zip(group.theirs, group.outward(empty))}
  foreign.check(expected, unused=foreign.family.heads if config.model.tied else ())
  return Imported(foreign, config, shapes, _by_part(groups, shapes))


def _read(path: pathlib.Path) -> Foreign:
  if path.suffix == '.gguf':
    return gguf_file.read(path)
  if not path.is_dir():
    raise UserError(
      f'--from={path} is not a folder; valid: a folder of Hugging Face, or a .gguf file'
    )
  return hf_folder.read(path)


def _context(overrides: Overrides, asked: int) -> Overrides:
  """Returns `data.context`. A model with learned positions keeps its context."""
  positions = overrides['data.context']
  learned = overrides.get('model.positions') == LEARNED
  if asked > positions or (learned and asked not in (0, positions)):
    valid = f'{positions}, the number of its learned positions' if learned else f'1 to {positions}'
    raise UserError(f'--context={asked} is not valid for this model; valid: {valid}')
  return {'data.context': asked or positions}


def _by_part(
  groups: list[Tensors], shapes: dict[str, tree.Tree]
) -> dict[int | None, list[Tensors]]:
  found: dict[int | None, list[Tensors]] = {}
  for group in groups:
    found.setdefault(Place.parse(group.ours[0]).layer, []).append(group)
  if missing := shapes.keys() - {path for group in groups for path in group.ours}:
    raise ValueError(f'the family has no tensor for {min(missing)}')
  return found


def _part(imported: Imported, part: int | None) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the paths and arrays of a part."""
  foreign = imported.foreign
  for group in imported.tensors[part]:
    arrays = [foreign.stored[foreign.find(name)].read() for name in group.theirs]
    for path, array in zip(group.ours, group.inward(arrays)):
      yield path, np.asarray(array, imported.shapes[path].dtype)
