"""What a family of pretrained models is, and the layouts of tensors."""

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
  """Foreign tensors and the parameters of this project that hold the same numbers.

  Attributes:
    theirs: names of the foreign tensors, without the family's prefix if they have it.
    ours: paths of the parameters.
    inward: a function from arrays of `theirs` to arrays of `ours`.
    outward: its inverse.
  """

  theirs: tuple[str, ...]
  ours: tuple[str, ...]
  inward: Callable[[Arrays], Arrays]
  outward: Callable[[Arrays], Arrays]


def same(theirs: str, ours: str) -> Tensors:
  """A tensor that is stored as it is here."""
  return Tensors((theirs,), (ours,), list, list)


def transposed(theirs: str, ours: str) -> Tensors:
  """The weight of a linear layer: `[out, in]` there, `[in, out]` here."""

  def turn(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays]

  return Tensors((theirs,), (ours,), turn, turn)


def stacked(theirs: Sequence[str], ours: str) -> Tensors:
  """The weights of all experts: E tensors `[out, in]` there, one `[E, in, out]` here."""

  def inward(arrays: Arrays) -> Arrays:
    return [np.stack([array.T for array in arrays])]

  def outward(arrays: Arrays) -> Arrays:
    return [array.T for array in arrays[0]]

  return Tensors(tuple(theirs), (ours,), inward, outward)


def columns(theirs: str, ours: Sequence[str]) -> Tensors:
  """One tensor there whose last axis holds several parameters of equal size here."""

  def inward(arrays: Arrays) -> Arrays:
    return np.split(arrays[0], len(ours), axis=-1)

  def outward(arrays: Arrays) -> Arrays:
    return [np.concatenate(arrays, axis=-1)]

  return Tensors((theirs,), tuple(ours), inward, outward)


def by_head(theirs: str, ours: Sequence[str], heads: int) -> Tensors:
  """One tensor there whose first axis holds, head by head, several parameters here.

  `[H * n * K, D]` there and n times `[D, H * K]` here; without D for biases.
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
    architecture: the class in the library transformers.
    prefix: begins the names of tensors in most files; some leave it out.
    buffers: regular expressions of tensors that are not parameters.
    heads: names of tensors of the head, which never have the prefix.
    mlps: names of the MLP methods of its models.
    gguf_permutes: whether GGUF files of this family permute the rows of queries and keys.
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

    The fields are those that differ from `configs/base.py`, by dotted name, with `data.context` and
    `data.vocab_size`. Raises UserError for values that this project does not compute.
    """

  @abc.abstractmethod
  def written(self, config: ConfigDict) -> JsonObject:
    """Returns the foreign config for a config of this project.

    It need not check that the config fits: the caller compares `read(written(config))` with it.
    """

  @abc.abstractmethod
  def tensors(self, config: ConfigDict) -> Iterator[Tensors]:
    """Yields all tensors of a model with this config of this project."""


def names() -> list[str]:
  """Returns the names of all families."""
  return discovery.names(FAMILIES)


def family(name: object, field: str) -> Family:
  """Returns a family by its name. Raises UserError, with the known families, if there is none."""
  if name not in names():
    raise unknown(field, name, names())
  return discovery.load(FAMILIES, name, field)()
