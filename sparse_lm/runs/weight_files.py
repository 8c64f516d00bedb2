"""The folder `weights/` of a workdir: the parameters of an imported or a pruned model, layer by layer.

- `layer_000.safetensors`, `layer_001.safetensors`, ...: the parameters of each layer.
- `outside.safetensors`: the other parameters: embeddings, the last norm and the head.
- `state.safetensors`: the model's other collections (calibrated thresholds), if it has any.
- `index.json`: what each file holds, with digests. It is written last, so a folder without it is not
  complete.

A parameter is stored under its path, and its mask under `<path>:mask`: the bits of the flattened mask,
packed into uint8 by `numpy.packbits`. A parameter without a mask is dense.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import TypedDict

import jax
import numpy as np
from safetensors.numpy import save_file

from sparse_lm.core import records, tree
from sparse_lm.core.errors import UserError, writing
from sparse_lm.core.paths import Place
from sparse_lm.core.tensor_files import TensorFile, open_tensors
from sparse_lm.core.tree import Tree
from sparse_lm.core.version import VERSION, WRITTEN_BY, format_mismatch
from sparse_lm.inference.pack import nested
from sparse_lm.runs import digests
from sparse_lm.runs.workdir import read_json, write_json
from sparse_lm.train.work import Work

FORMAT = 1
INDEX = 'index.json'
STATE = 'state.safetensors'
_MASK = ':mask'
_DIGESTS = 'digests'  # key of a file's metadata: the digest of each array, as JSON


class _File(TypedDict):
  """The arrays of a file: shapes by name, and a digest of all."""

  shapes: dict[str, list[int]]
  digest: int


class _Index(TypedDict):
  """The contents of index.json, besides the version that wrote it.

  Attributes:
    format: the version of the folder's layout, `FORMAT`.
    layers: number of layers.
    source: where the weights come from, in words.
    step: optimizer steps that the weights had been trained for here.
    work: FLOPs of training, the fields of `Work`.
    files: the files by name.
  """

  format: int
  layers: int
  source: str
  step: int
  work: dict[str, float]
  files: dict[str, _File]


@dataclasses.dataclass(frozen=True)
class WeightFiles:
  """The weights of a model, in one file for each layer and one for the rest.

  A part is the number of a layer, or `None` for the parameters outside the layers. To write a folder,
  give the number of layers, write every part of `missing()` in any order, and call `finish`. After an
  interruption, write the parts that are still missing.

  Attributes:
    folder: the folder `weights/`.
    planned: number of layers, if the folder is being written; `None` for a complete folder.
  """

  folder: pathlib.Path
  planned: int | None = None

  @functools.cached_property
  def index(self) -> _Index:
    """The contents of index.json.

    Raises UserError if the file is missing or damaged, or if a later version wrote it.
    """
    if not (self.folder / INDEX).exists():
      raise UserError(
        f'{self.folder} has no {INDEX}, so it is not complete; valid: a folder that convert or prune '
        'has finished'
      )
    index = read_json(self.folder / INDEX)
    if index.get('format') != FORMAT:
      what, by = str(self.folder / INDEX), index.get(WRITTEN_BY)
      raise UserError(
        f'{format_mismatch(what, index.get("format"), FORMAT, by)}; valid: that version'
      )
    try:
      records.check(index, _Index)
      Work(**index['work'])
      if lacking := {_name(part) for part in _parts(index['layers'])} - index['files'].keys():
        raise ValueError(f'it does not list {min(lacking)}')
    except (ValueError, TypeError) as error:
      raise UserError(f'{self.folder / INDEX} is damaged ({error}); valid: a copy of it') from None
    return index

  @property
  def layers(self) -> int:
    """Number of layers."""
    return self.index['layers'] if self.planned is None else self.planned

  @property
  def parts(self) -> list[int | None]:
    """All parts, beginning with the one outside the layers."""
    return _parts(self.layers)

  @property
  def source(self) -> str:
    """Where the weights come from, in words."""
    return self.index['source']

  @property
  def step(self) -> int:
    """Optimizer steps that the weights had been trained for."""
    return self.index['step']

  @property
  def work(self) -> Work:
    """FLOPs that training had spent."""
    return Work(**self.index['work'])

  def missing(self) -> list[int | None]:
    """Returns the parts that are not yet written."""
    return [part for part in self.parts if not (self.folder / _name(part)).exists()]

  def read(self, part: int | None) -> tuple[Tree, Tree]:
    """Returns the parameters and masks of a part; the arrays of parameters are memory maps.

    Args:
      part: number of the layer, or `None` for the parameters outside the layers.

    Returns:
      The subtree of the model's parameters, and a tree like it of bool masks, `None` = dense. A parameter
      is read from the file when it is used.

    Raises UserError if the file is missing or damaged.
    """
    file = self._open(_name(part))
    arrays = {name: a for name, a in file.arrays.items() if not name.endswith(_MASK)}
    bits = {name: file.arrays.get(name + _MASK) for name in arrays}
    masks = {name: _unpacked(b, arrays[name].shape) for name, b in bits.items()}
    return nested(arrays), nested(masks)

  def read_all(self) -> tuple[Tree, Tree]:
    """Returns the parameters and masks of the whole model; see `read`."""
    params, masks = {}, {}
    for part in self.parts:
      found = self.read(part)
      params, masks = params | found[0], masks | found[1]
    return params, masks

  @property
  def model_state(self) -> Tree:
    """The model's collections besides the parameters. Raises UserError if their file is damaged."""
    return nested(self._open(STATE).arrays) if STATE in self.index['files'] else {}

  def write_state(self, model_state: Tree) -> None:
    """Writes the model's collections besides the parameters to one file."""
    arrays = {path: _plain(leaf) for path, leaf in tree.named(model_state).items()}
    self._save(STATE, arrays)

  def write(self, part: int | None, params: Tree, masks: Tree) -> None:
    """Writes the file of a part. The file appears whole or not at all.

    Args:
      part: number of the layer, or `None` for the parameters outside the layers.
      params: the subtree of the model's parameters, with exact zeros for dropped weights.
      masks: a tree like it of bool masks, `None` = dense.

    Raises ValueError if a parameter belongs to another part, and UserError if the file cannot be written.
    """
    arrays = {path: _plain(leaf) for path, leaf in tree.named(params).items()}
    if wrong := [path for path in arrays if Place.parse(path).layer != part]:
      raise ValueError(f'{wrong[0]} does not belong to part {part}')
    for path, mask in tree.named(masks).items():
      arrays[path + _MASK] = np.packbits(np.asarray(mask))
    self._save(_name(part), arrays)

  def _save(self, name: str, arrays: dict[str, np.ndarray]) -> None:
    found, target = json.dumps(digests.of_leaves(arrays)), self.folder / name
    with writing(target):
      self.folder.mkdir(parents=True, exist_ok=True)
      temporary = target.with_name(target.name + '.tmp')
      save_file(arrays, temporary, metadata={_DIGESTS: found})
      os.replace(temporary, target)

  def finish(self, source: str, step: int = 0, work: Work = Work()) -> None:  # noqa: B008
    """Writes index.json, which makes the folder complete.

    Args:
      source: where the weights come from, in words.
      step: optimizer steps that the weights had been trained for.
      work: FLOPs that training had spent.

    Raises ValueError if parts are missing.
    """
    if missing := self.missing():
      raise ValueError(f'parts {missing} are not written')
    files: dict[str, _File] = {}
    names = [_name(part) for part in self.parts]
    for own in (*names, STATE) if (self.folder / STATE).exists() else names:
      file = open_tensors(self.folder / own)
      shapes = {name: list(array.shape) for name, array in file.arrays.items()}
      files[own] = {'shapes': shapes, 'digest': _digest(file)}
    index: _Index = {
      'format': FORMAT,
      'layers': self.layers,
      'source': source,
      'step': step,
      'work': dataclasses.asdict(work),
      'files': files,
    }
    write_json(self.folder / INDEX, index | {WRITTEN_BY: VERSION})

  def _open(self, name: str) -> TensorFile:
    """Returns a file, after all its digests were checked."""
    path = self.folder / name
    file = open_tensors(path)
    try:
      found = records.parse(file.metadata.get(_DIGESTS, '').encode(), dict[str, int])
      if self.planned is None and _digest(file) != self.index['files'][path.name]['digest']:
        raise ValueError(f'its digests are not those in {INDEX}')
      if {*file.arrays} != {*found}:
        raise ValueError('it has other arrays than its metadata lists')
      digests.check(path.name, file.arrays, found)
    except ValueError as error:
      raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None
    return file


def _parts(layers: int) -> list[int | None]:
  return [None, *range(layers)]


def _name(part: int | None) -> str:
  return 'outside.safetensors' if part is None else f'layer_{part:03}.safetensors'


def _plain(leaf: jax.Array | np.ndarray) -> np.ndarray:
  return np.asarray(jax.device_get(leaf), order='C')


def _unpacked(bits: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
  if bits is None:
    return None
  size = int(np.prod(shape))
  return np.unpackbits(bits, count=size).astype(bool).reshape(shape)


def _digest(file: TensorFile) -> int:
  """Returns the digest of a file's digests."""
  return digests.of_json(file.metadata.get(_DIGESTS, ''))
