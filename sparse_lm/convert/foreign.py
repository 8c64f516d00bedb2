"""A pretrained model of another library on disk, before its conversion."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from sparse_lm.convert.family import Family
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.data.hf_tokenizer import HuggingFace


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor on disk. Its array is in memory only after a call of `read`."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A pretrained model.

  Attributes:
    path: its folder or file.
    where: the file that holds its config, for messages.
    family: its family.
    config: its config, with the fields of Hugging Face.
    stored: its tensors by name.
    tokenizer: creates its tokenizer, given the number of rows of its embedding.
  """

  path: pathlib.Path
  where: str
  family: Family
  config: JsonObject
  stored: Mapping[str, Stored]
  tokenizer: Callable[[int], HuggingFace]

  def find(self, name: str) -> str | None:
    """Returns the full name of a tensor, with or without the family's prefix; `None` if it is missing."""
    return next((n for n in (self.family.prefix + name, name) if n in self.stored), None)

  def check(self, expected: Mapping[str, tuple[int, ...]], unused: tuple[str, ...] = ()) -> None:
    """Raises UserError unless the tensors are those expected.

    Args:
      expected: shapes by name, without the family's prefix.
      unused: names of tensors that may be there and are not read.
    """
    used = {self.find(name) for name in unused}
    for name, shape in expected.items():
      found = self.find(name)
      if found is None:
        raise UserError(
          f'{self.path} has no tensor {name}; valid: all tensors that {self.where} describes'
        )
      if self.stored[found].shape != shape:
        raise UserError(
          f'{self.path}: the tensor {found} has the shape {list(self.stored[found].shape)}, and '
          f'{self.where} describes {list(shape)}; valid: the tensors of this config'
        )
      used.add(found)
    for name in self.stored:
      if name not in used and not any(re.search(one, name) for one in self.family.buffers):
        raise UserError(
          f'{self.path}: the tensor {name} has no place in this model, so it would be lost; valid: a '
          f'model of the family {type(self.family).__name__} without it'
        )
