"""A packed model as a folder: what it is in JSON, its arrays in safetensors, and a plain copy for others.

config.json, tokenizer.json  of the run that was packed.
packed.json                  version, digest, and for each matrix the format that is stored and that runs.
packed.safetensors           the arrays: `<path>:<field>` of formats (`<field>/0`, ... of a tuple),
                             `<path>` of the rest.
model.safetensors            every parameter under its path, zeros where a weight was dropped.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from sparse_lm.core import config as configs
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.packed import Format, is_packed
from sparse_lm.data import tokenizers
from sparse_lm.inference.pack import Matrix, PackedModel, load_format, name_of, nested
from sparse_lm.model import lm
from sparse_lm.train.trained import Trained
from sparse_lm.train.workdir import check_new, read_json, whole_folder, write_json

VERSION = 2
MANIFEST, ARRAYS, PLAIN = 'packed.json', 'packed.safetensors', 'model.safetensors'


@dataclasses.dataclass(frozen=True)
class Saved:
  """A packed folder, loaded.

  Attributes:
    packed: ready to run.
    manifest: the contents of packed.json.
  """

  path: str
  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  packed: PackedModel
  manifest: dict[str, Any]

  @property
  def source(self) -> str:
    """Which folder and checkpoint it is, in words."""
    return f'{self.path}: packed from {self.manifest["source"]}'


def save(packed: PackedModel, trained: Trained, out: str, facts: dict[str, Any]) -> None:
  """Writes the folder as a whole: it is there with everything in it, or not at all.

  Raises UserError where it is there already.
  """
  check_new(out, '--out')
  with whole_folder(out) as whole:
    _write(packed, trained, whole, facts)


def _write(
  packed: PackedModel, trained: Trained, folder: pathlib.Path, facts: dict[str, Any]
) -> None:
  arrays, matrices = _arrays(packed)
  save_file(arrays, folder / ARRAYS)
  save_file(
    {p: jax.numpy.asarray(a) for p, a in tree.named(trained.params).items()}, folder / PLAIN
  )
  write_json(folder / 'config.json', configs.to_json(trained.config))
  write_json(folder / 'tokenizer.json', trained.tokenizer.to_json())
  manifest = {'version': VERSION, 'sha256': _digest(folder / ARRAYS), 'step': trained.step}
  write_json(
    folder / MANIFEST, manifest | facts | {'removed': packed.removed, 'matrices': matrices}
  )


def load(path: str) -> Saved:
  """Loads a packed folder.

  Raises:
    UserError: it is none, of another version, or its arrays are not those that were written.
  """
  folder = pathlib.Path(os.path.expanduser(path))
  if not (folder / MANIFEST).exists():
    raise UserError(
      f'{path} holds no packed model (no {MANIFEST}); valid: python -m sparse_lm.pack'
    )
  manifest = read_json(folder / MANIFEST)
  if manifest.get('version') != VERSION:
    raise UserError(
      f'{folder / MANIFEST} is of version {manifest.get("version")}, and this one reads {VERSION}; '
      'valid: pack the run again'
    )
  if not (folder / ARRAYS).exists() or _digest(folder / ARRAYS) != manifest['sha256']:
    raise UserError(
      f'{folder / ARRAYS} does not match the sha256 in {MANIFEST}; valid: pack the run again'
    )
  try:
    arrays = load_file(folder / ARRAYS)
  except SafetensorError as error:
    raise UserError(f'{folder / ARRAYS} is damaged ({error}); valid: pack the run again') from None
  config = configs.from_json(read_json(folder / 'config.json'))
  tokenizer = tokenizers.from_json(read_json(folder / 'tokenizer.json'))
  model = lm.from_config(config, tokenizer.vocab_size)
  matrices = {p: _matrix(p, entry, arrays) for p, entry in manifest['matrices'].items()}
  held = {path: array for path, array in arrays.items() if ':' not in path.partition('/')[2]}
  running = {f'packed/{path}': matrix.runs for path, matrix in matrices.items()}
  packed = PackedModel(model, nested(held | running), matrices, manifest['removed'])
  return Saved(path, config, tokenizer, packed, manifest)


def is_saved(path: str) -> bool:
  """Whether a folder holds a packed model."""
  return (pathlib.Path(os.path.expanduser(path)) / MANIFEST).exists()


def _arrays(packed: PackedModel) -> tuple[dict[str, jax.Array], dict[str, Any]]:
  arrays, matrices = {}, {}
  leaves = jax.tree_util.tree_leaves_with_path(packed.variables, is_leaf=is_packed)
  for path, leaf in leaves:
    if not is_packed(leaf):
      arrays[tree.path_name(path)] = jax.numpy.asarray(leaf)
  for path, matrix in packed.matrices.items():
    for name, array in tree.named(matrix.stored).items():
      arrays[f'packed/{path}:{name}'] = jax.numpy.asarray(array)
    static = {
      field.name: getattr(matrix.stored, field.name)
      for field in dataclasses.fields(matrix.stored)
      if not field.metadata.get('pytree_node', True)
    }
    matrices[path] = {
      'runs': name_of(matrix.runs),
      'stored': name_of(matrix.stored),
      'fields': static,
      'dense_bytes': matrix.dense_bytes,
      'stored_bytes': matrix.stored.nbytes,
      'why': matrix.why,
    }
  return arrays, matrices


def _matrix(path: str, entry: dict[str, Any], arrays: dict[str, jax.Array]) -> Matrix:
  cls = load_format(entry['stored'])
  prefix = f'packed/{path}:'
  fields = _fields({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
  static = {k: tuple(v) if isinstance(v, list) else v for k, v in entry['fields'].items()}
  stored = cls(**fields, **static)
  runs: Format = stored
  if entry['runs'] != entry['stored']:
    kernel = np.asarray(stored.kernel())
    runs = jax.device_put(load_format(entry['runs']).pack(kernel, kernel != 0))
  return Matrix(path, runs, stored, entry['dense_bytes'], entry['why'])


def _fields(arrays: dict[str, jax.Array]) -> dict[str, Any]:
  """Those of a format: `field`, or `field/0`, `field/1`, ... of a tuple."""
  fields: dict[str, Any] = {}
  for name in sorted(arrays, key=lambda name: (len(name), name)):
    field, in_tuple, _ = name.partition('/')
    fields[field] = (*fields.get(field, ()), arrays[name]) if in_tuple else arrays[name]
  return fields


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def describe(packed: PackedModel) -> list[dict[str, Any]]:
  """A row for each matrix, for people."""
  return [
    {
      'matrix': path,
      'runs': name_of(m.runs),
      'stored': name_of(m.stored),
      'dense kB': m.dense_bytes / 1e3,
      'running kB': m.runs.nbytes / 1e3,
      'stored kB': m.stored.nbytes / 1e3,
      'why dense': m.why,
    }
    for path, m in packed.matrices.items()
  ]
