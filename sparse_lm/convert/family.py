"""The base class of model families, and the conversions between layouts of tensors."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from sparse_lm.convert.fields import Fields
from sparse_lm.convert.methods import GATED_MLP, Overrides
from sparse_lm.core import discovery
from sparse_lm.core.errors import unknown
from sparse_lm.core.records import JsonObject

FAMILIES = 'sparse_lm.convert.families'
Arrays = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensors:
  """A group of foreign tensors, and the parameters of this project that hold the same numbers.

  Attributes:
    theirs: names of the foreign tensors, without the family's prefix.
    ours: paths of the parameters.
    inward: a function from arrays of `theirs` to arrays of `ours`.
    outward: the inverse of `inward`.
  """

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  inward: Callable[[Arrays], Arrays]
  outward: Callable[[Arrays], Arrays]


def same(theirs: str, ours: str) -> Tensors:
  """Returns a group of one tensor and one parameter with the same layout."""
  return Tensors((theirs,), (ours,), list, list)


def transposed(theirs: str, ours: str) -> Tensors:
  """Converts the weight of a linear layer: `[out, in]` in the file, `[in, out]` here."""

  def turn(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays]

  return Tensors((theirs,), (ours,), turn, turn)


def stacked(theirs: Sequence[str], ours: str) -> Tensors:
  """Converts the weights of E experts: E tensors `[out, in]` in the file, one `[E, in, out]` here."""

  def inward(arrays: Arrays) -> Arrays:
    return [np.stack([array.T for array in arrays])]

  def outward(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays[0]]

  return Tensors(tuple(theirs), (ours,), inward, outward)


def columns(theirs: str, ours: Sequence[str]) -> Tensors:
  """Splits the last axis of a fused tensor into several parameters of equal size."""

  def inward(arrays: Arrays) -> Arrays:
    return np.split(arrays[0], len(ours), axis=-1)

  def outward(arrays: Arrays) -> Arrays:
    return [np.concatenate(arrays, axis=-1)]

  return Tensors((theirs,), tuple(ours), inward, outward)


def by_head(theirs: str, ours: Sequence[str], heads: int) -> Tensors:
  """Splits the first axis of a fused tensor, which is ordered by head, into several parameters.

  The tensor is `[H * n * K, D]`, for n parameters of H heads of width K, and each parameter is
  `[D, H * K]`. Biases have no axis D.
  """

  def inward(arrays: Arrays) -> Arrays:
    rows = arrays[0].reshape(heads, len(ours), -1, *arrays[0].shape[1:])
    return [rows[:, i].reshape(-1, *arrays[0].shape[1:]).T for i in range(len(ours))]

  def outward(arrays: Arrays) -> Arrays:
    rows = np.stack([a.T.reshape(heads, -1, *a.shape[:-1]) for a in arrays], axis=1)
    return [rows.reshape(-1, *arrays[0].shape[:-1])]

  return Tensors((theirs,), tuple(ours), inward, outward)


class Family(abc.ABC):
  """A family of pretrained models. Its file has the name of `model_type` in their config.json.

  Attributes:
    architecture: name of the model's class in the library transformers.
    prefix: the first part of tensor names in most files; some files leave it out.
    buffers: regular expressions for the names of tensors that are not parameters.
    heads: names of tensors of the head, which never have the prefix.
    mlps: names of the MLP methods of its models.
    gguf_permutes: whether GGUF files of this family permute the rows of queries and keys; `None` means
      that GGUF files of this family are not supported.
  """

  architecture: ClassVar[str]
  prefix: ClassVar[str]
  heads: ClassVar[tuple[str, ...]] = ('lm_head.weight',)
  mlps: ClassVar[tuple[str, ...]] = (GATED_MLP,)
  buffers: ClassVar[tuple[str, ...]] = (r'rotary_emb\.inv_freq$',)
  gguf_permutes: ClassVar[bool | None] = None

  @abc.abstractmethod
  def read(self, fields: Fields) -> Overrides:
    """Returns the fields of this project's config for a foreign config.

    The result has all fields that differ from `configs/base.py`, by dotted name, and always
    `data.context` and `data.vocab_size`. Raises UserError for values that this project does not support.
    """

  @abc.abstractmethod
  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config for a config of this project.

    It need not check that the family can express the config, because the caller compares
    `read(written(config))` with the config.
    """

  @abc.abstractmethod
  def tensors(self, config: ConfigDict) -> Iterator[Tensors]:
    """Yields the groups of all tensors of a model, given its config in this project."""


def names() -> list[str]:
  """Returns the names of all families."""
  return discovery.names(FAMILIES)


def family(name: object, field: str) -> Family:
  """Returns a family by its name. Raises UserError, with the known families, if there is none."""
  if name not in names():
    raise unknown(field, name, names())
  return discovery.load(FAMILIES, name, field)()
