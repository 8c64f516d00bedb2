"""The folder of a packed model.

- `config.json`, `tokenizer.json`: copies of those of the packed run.
- `metrics.jsonl`: a copy of the run's log, if the run has one.
- `packed.json`: the versions of the layout and the package, the digests of the other files, the run's
  training cost, and the formats of each matrix: the one that is stored and the one that runs.
- `packed.safetensors`: the packed arrays: `<path>:<field>` for the fields of a format (`<field>/0`,
  `<field>/1`, ... for a tuple), `<path>` for other arrays.
- `model.safetensors`: every parameter under its path, with zeros for dropped weights. Other libraries
  can read it.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
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
from sparse_lm.core.tree import Tree
from sparse_lm.core.version import VERSION, WRITTEN_BY, format_mismatch
from sparse_lm.data import tokenizers
from sparse_lm.inference import formats
from sparse_lm.inference.pack import Matrix, PackedModel, nested
from sparse_lm.model import lm
from sparse_lm.model.plans import plan_of
from sparse_lm.runs import configs, cost_report
from sparse_lm.runs.build import build
from sparse_lm.runs.run_folder import CONFIG, LOG, read_config, with_format
from sparse_lm.runs.trained import Trained
from sparse_lm.runs.workdir import check_new, read_json, whole_folder, write_json
from sparse_lm.train.work import Work

FORMAT = 6
MANIFEST, ARRAYS, PLAIN = 'packed.json', 'packed.safetensors', 'model.safetensors'
READ = (ARRAYS, CONFIG, 'tokenizer.json')


class _Entry(TypedDict):
  """A matrix of the manifest: names of its formats, and those fields of the stored format that are not
  arrays."""

  runs: str
  stored: str
  fields: dict[str, int | list[int]]
  dense_bytes: int
  why: str


class _Manifest(TypedDict):
  """The contents of packed.json, besides the results of the checks that `pack` ran.

  Attributes:
    version: the version of the folder's layout, `FORMAT`.
    sha256: the digest of each file, by its name.
    source: the checkpoint that was packed, in words.
    step: optimizer steps that the checkpoint had completed.
    work: FLOPs of training, the fields of `Work`.
    masked: paths of the parameters that have a mask.
    removed: a sentence for each unit that was removed as a whole.
  """

  version: int
  sha256: dict[str, str]
  source: str
  step: int
  work: dict[str, float]
  masked: list[str]
  removed: list[str]
  matrices: dict[str, _Entry]


@dataclasses.dataclass(frozen=True, repr=False)
class Saved:
  """The loaded contents of a packed folder.

  Attributes:
    packed: the packed model.
    manifest: the contents of packed.json.
  """

  path: str
  config: ConfigDict
  tokenizer: tokenizers.Tokenizer
  packed: PackedModel
  manifest: JsonObject

  @property
  def source(self) -> str:
    """The folder and the checkpoint that was packed, in words."""
    return f'{self.path}: packed from {self.manifest["source"]}'

  @property
  def folder(self) -> pathlib.Path:
    """The folder itself, which holds metrics.jsonl too."""
    return pathlib.Path(os.path.expanduser(self.path))

  @property
  def step(self) -> int:
    """Optimizer steps that the packed checkpoint had completed."""
    return self.manifest['step']

  @functools.cached_property
  def params(self) -> Tree:
    """The run's parameters, with zeros for dropped weights, read from model.safetensors.

    Raises UserError if the file is missing or was changed.
    """
    _check_digest(self.folder, PLAIN, self.manifest)
    return nested(load_file(self.folder / PLAIN))

  @functools.cached_property
  def masks(self) -> Tree:
    """A tree like `params`: True where a weight of a masked parameter is not zero, `None` = dense."""
    masked = set(self.manifest['masked'])
    return tree.map_named(lambda path, w: w != 0 if path in masked else None, self.params)

  def costs(self) -> dict[str, float]:
    """The numbers of `Trained.costs` for the packed run."""
    program, target = build(self.config, self.tokenizer.vocab_size)
    work = Work(**self.manifest['work']).over(cost_report.tokens(self.config, self.step))
    return cost_report.report(program, target, self.masks, work=work)

  def __repr__(self) -> str:
    return f'Saved({self.path!r}, {self.packed}, {self.tokenizer})'


def save(packed: PackedModel, trained: Trained, out: str, facts: JsonObject) -> None:
  """Writes a packed folder: either the whole folder appears, or nothing does.

  Args:
    packed: the model to write.
    trained: the run that was packed.
    out: the new folder.
    facts: the results of the checks, for packed.json.

  Raises UserError if `out` already exists or cannot be written.
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
  log = trained.folder / LOG
  if log.exists():
    shutil.copyfile(log, folder / LOG)
  manifest = {
    'version': FORMAT,
    WRITTEN_BY: VERSION,
    'sha256': {name: _digest(folder / name) for name in (*READ, PLAIN)},
    'step': trained.step,
    'work': dataclasses.asdict(trained.work),
    'masked': list(tree.named(trained.masks)),
    **facts,
    'removed': packed.removed,
    'matrices': matrices,
  }
  write_json(folder / MANIFEST, manifest)


def load(path: str) -> Saved:
  """Loads a packed folder.

  Raises:
    UserError: the folder holds no packed model, has another version, or has a file that was changed.
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
  """Returns the contents of packed.json, after comparing the digests of the other files."""
  manifest = read_json(folder / MANIFEST)
  found = manifest.get('version')
  if found != FORMAT:
    raise UserError(
      f'{format_mismatch(str(folder / MANIFEST), found, FORMAT, manifest.get(WRITTEN_BY))}; valid: pack '
      'the run again'
    )
  try:
    records.check(manifest, _Manifest)
  except ValueError as error:
    raise UserError(
      f'{folder / MANIFEST} is damaged ({error}); valid: pack the run again'
    ) from None
  for name in READ:
    _check_digest(folder, name, manifest)
  return manifest


def _check_digest(folder: pathlib.Path, name: str, manifest: JsonObject) -> None:
  """Raises UserError if a file of the folder is missing or was changed."""
  if not (folder / name).is_file():
    raise UserError(f'{folder / name} cannot be read (no such file); valid: a complete folder')
  if _digest(folder / name) != manifest['sha256'].get(name):
    raise UserError(
      f'{folder / name} does not match the sha256 in {MANIFEST}; valid: pack the run again'
    )


def is_saved(path: str) -> bool:
  """True if the folder holds a packed model."""
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
  """Returns the shape of every kernel before units were removed, also of fused kernels, by path."""
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
  """Builds a matrix from its arrays. Raises ValueError if it is larger than the model's kernel."""
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
  """Returns the fields of a format from arrays named `field`, or `field/0`, `field/1`, ... for tuples."""
  fields: dict[str, jax.Array | tuple[jax.Array, ...]] = {}
  for name in sorted(arrays, key=lambda name: (len(name), name)):
    field, in_tuple, _ = name.partition('/')
    fields[field] = (*fields.get(field, ()), arrays[name]) if in_tuple else arrays[name]
  return fields


def _digest(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def describe(packed: PackedModel) -> list[dict[str, str | float]]:
  """Returns a row for each matrix, for a printed table."""
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
