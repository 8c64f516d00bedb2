"""A packed model as a folder: what it is in JSON, its arrays in safetensors, and a plain copy for others.

config.json, tokenizer.json  of the run that was packed.
packed.json                  versions of layout and package, digests of the other files that are read, and
                             for each matrix the format that is stored and that runs.
packed.safetensors           the arrays: `<path>:<field>` of formats (`<field>/0`, ... of a tuple),
                             `<path>` of the rest.
model.safetensors            every parameter under its path, zeros where a weight was dropped.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import TypedDict

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from sparse_lm.core import records, tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.format import Format, is_packed
from sparse_lm.core.paths import KERNEL, Place
from sparse_lm.core.records import JsonObject
from sparse_lm.core.version import VERSION, WRITTEN_BY, other_format
from sparse_lm.data import tokenizers
from sparse_lm.inference import formats
from sparse_lm.inference.pack import Matrix, PackedModel, nested
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs
from sparse_lm.runs.run_folder import CONFIG, read_config, with_format
from sparse_lm.runs.trained import Trained
from sparse_lm.runs.workdir import check_new, read_json, whole_folder, write_json

FORMAT = 5
MANIFEST, ARRAYS, PLAIN = 'packed.json', 'packed.safetensors', 'model.safetensors'
READ = (ARRAYS, CONFIG, 'tokenizer.json')


class _Entry(TypedDict):
  """A matrix: names of its formats, and the fields of the stored one that are no arrays."""

  runs: str
  stored: str
  fields: dict[str, int | list[int]]
  dense_bytes: int
  why: str


class _Manifest(TypedDict):
  """The contents of packed.json, beside what `pack` found out.

  Attributes:
    version: of the folder's format, `FORMAT`.
    sha256: by name of a file.
  """

  version: int
  sha256: dict[str, str]
  source: str
  step: int
  removed: list[str]
  matrices: dict[str, _Entry]


@dataclasses.dataclass(frozen=True, repr=False)
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
  manifest: JsonObject

  @property
  def source(self) -> str:
    """Which folder and checkpoint it is, in words."""
    return f'{self.path}: packed from {self.manifest["source"]}'

  def __repr__(self) -> str:
    return f'Saved({self.path!r}, {self.packed}, {self.tokenizer})'


def save(packed: PackedModel, trained: Trained, out: str, facts: JsonObject) -> None:
  """Writes the folder as a whole: it is there with everything in it, or not at all.

  Raises UserError where it is there already.
  """
  check_new(out, '--out')
  with whole_folder(out) as whole:
    try:
      _write(packed, trained, whole, facts)
    except SafetensorError as error:  # its own type, for a full disk too
      raise UserError(f'{out} cannot be written ({error}); valid: a folder with room') from error


def _write(packed: PackedModel, trained: Trained, folder: pathlib.Path, facts: JsonObject) -> None:
  arrays, matrices = _arrays(packed)
  save_file(arrays, folder / ARRAYS)
  save_file(
    {p: jax.numpy.asarray(a) for p, a in tree.named(trained.params).items()}, folder / PLAIN
  )
  write_json(folder / CONFIG, with_format(configs.to_json(trained.config)))
  write_json(folder / 'tokenizer.json', trained.tokenizer.to_json())
  digests = {name: _digest(folder / name) for name in READ}
  manifest = {'version': FORMAT, WRITTEN_BY: VERSION, 'sha256': digests, 'step': trained.step}
  write_json(
    folder / MANIFEST, manifest | facts | {'removed': packed.removed, 'matrices': matrices}
  )


def load(path: str) -> Saved:
  """Loads a packed folder.

  Raises:
    UserError: it is none, of another version, or its files are not those that were written.
  """
  folder = pathlib.Path(os.path.expanduser(path))
  if not (folder / MANIFEST).exists():
    raise UserError(
      f'{path} holds no packed model (no {MANIFEST}); valid: python -m sparse_lm.pack'
    )
  manifest = _manifest(folder)
  try:
    arrays = load_file(folder / ARRAYS)
  except SafetensorError as error:
    raise UserError(f'{folder / ARRAYS} is damaged ({error}); valid: pack the run again') from None
  config = configs.of_run(read_config(folder), folder / CONFIG)
  tokenizer = tokenizers.from_json(read_json(folder / 'tokenizer.json'))
  model = lm.from_config(config, tokenizer.vocab_size)
  largest = _kernel_shapes(model)
  matrices = {}
  for name, entry in manifest['matrices'].items():
    try:
      matrices[name] = _matrix(name, entry, arrays, largest[name])
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise UserError(
        f'{folder / MANIFEST}: the matrix {name[:100]!r} does not fit its arrays or the model ({error}); '
        'valid: pack the run again'
      ) from None
  unpacked = {path: array for path, array in arrays.items() if ':' not in path.partition('/')[2]}
  running = {f'packed/{path}': matrix.runs for path, matrix in matrices.items()}
  packed = PackedModel(model, nested(unpacked | running), matrices, manifest['removed'])
  return Saved(path, config, tokenizer, packed, manifest)


def _manifest(folder: pathlib.Path) -> JsonObject:
  """The contents of packed.json, once all digests have been compared."""
  manifest = read_json(folder / MANIFEST)
  found = manifest.get('version')
  if found != FORMAT:
    raise UserError(
      f'{other_format(str(folder / MANIFEST), found, FORMAT, manifest.get(WRITTEN_BY))}; valid: pack the '
      'run again'
    )
  try:
    records.check(manifest, _Manifest)
  except ValueError as error:
    raise UserError(
      f'{folder / MANIFEST} is damaged ({error}); valid: pack the run again'
    ) from None
  for name in READ:
    if not (folder / name).is_file():
      raise UserError(f'{folder / name} cannot be read (no such file); valid: a whole folder')
    if _digest(folder / name) != manifest['sha256'].get(name):
      raise UserError(
        f'{folder / name} does not match the sha256 in {MANIFEST}; valid: pack the run again'
      )
  return manifest


def is_saved(path: str) -> bool:
  """Whether a folder holds a packed model."""
  return (pathlib.Path(os.path.expanduser(path)) / MANIFEST).exists()


def _arrays(packed: PackedModel) -> tuple[dict[str, jax.Array], JsonObject]:
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
      'runs': formats.name_of(matrix.runs),
      'stored': formats.name_of(matrix.stored),
      'fields': static,
      'dense_bytes': matrix.dense_bytes,
      'stored_bytes': matrix.stored.nbytes,
      'why': matrix.why,
    }
  return arrays, matrices


def _kernel_shapes(model: lm.LM) -> dict[str, tuple[int, ...]]:
  """By path, the shape of every kernel before anything was removed, of joined ones too."""
  shapes = {path: leaf.shape for path, leaf in plan_of(model).shapes.items()}
  for path, parts in plan_of(model).fused.items():
    one, *each = (str(Place.parse(layer) / KERNEL) for layer in (path, *parts))
    kernels = [shapes[part] for part in each if part in shapes]
    if kernels:
      shapes[one] = (*kernels[0][:-1], sum(shape[-1] for shape in kernels))
  return shapes


def _matrix(
  path: str, entry: _Entry, arrays: dict[str, jax.Array], largest: tuple[int, ...]
) -> Matrix:
  """Raises ValueError, before anything is allocated, where the matrix is larger than the model's."""
  cls, running = formats.load(entry['stored']), formats.load(entry['runs'])
  prefix = f'packed/{path}:'
  fields = _fields({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
  static = {k: tuple(v) if isinstance(v, list) else v for k, v in entry['fields'].items()}
  stored = cls(**fields, **static)
  if len(stored.shape) != len(largest) or any(a > b for a, b in zip(stored.shape, largest)):
    raise ValueError(f'its shape is {stored.shape}, and that of the model {largest}')
  runs: Format = stored
  if entry['runs'] != entry['stored']:
    kernel = np.asarray(stored.kernel())
    runs = jax.device_put(running.pack(kernel, kernel != 0))
  return Matrix(path, runs, stored, entry['dense_bytes'], entry['why'])


def _fields(arrays: dict[str, jax.Array]) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
  """Those of a format: `field`, or `field/0`, `field/1`, ... of a tuple."""
  fields: dict[str, jax.Array | tuple[jax.Array, ...]] = {}
  for name in sorted(arrays, key=lambda name: (len(name), name)):
    field, in_tuple, _ = name.partition('/')
    fields[field] = (*fields.get(field, ()), arrays[name]) if in_tuple else arrays[name]
  return fields


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def describe(packed: PackedModel) -> list[dict[str, str | float]]:
  """A row for each matrix, for people."""
  return [
    {
      'matrix': path,
      'runs': formats.name_of(m.runs),
      'stored': formats.name_of(m.stored),
      'dense kB': m.dense_bytes / 1e3,
      'running kB': m.runs.nbytes / 1e3,
      'stored kB': m.stored.nbytes / 1e3,
      'why dense': m.why,
    }
    for path, m in packed.matrices.items()
  ]
