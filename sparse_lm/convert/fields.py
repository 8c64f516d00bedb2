"""Reads a foreign config field by field, and refuses fields that no code has read."""

import dataclasses
import fnmatch
from typing import TypeVar

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, require
from sparse_lm.core.records import Json, JsonObject

# Shell patterns of fields that do not change what a model computes in evaluation.
HARMLESS = (
  *('architectures', 'model_type', 'torch_dtype', 'dtype', 'transformers_version', '_*'),
  *('use_cache', 'return_dict*', 'output_*', 'torchscript', 'gradient_checkpointing'),
  *('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id', 'sep_token_id'),
  *('initializer_range', '*dropout', '*_pdrop', 'router_aux_loss_coef', 'router_jitter_noise'),
  *('classifier_*', 'summary_*', 'task_specific_params', 'problem_type', 'id2label', 'label2id'),
  *('pretraining_tp', 'is_llama_config', 'transformers.js_config', 'chunk_size_feed_forward'),
  *('use_bfloat16', 'name_or_path', 'is_decoder'),
)
_MISSING = object()
T = TypeVar('T')


@dataclasses.dataclass
class Fields:
  """The fields of a foreign config.

  Attributes:
    values: the fields by name.
    where: the file or folder, for messages.
  """

  values: JsonObject
  where: str
  _read: set[str] = dataclasses.field(default_factory=set)

  def take(self, name: str, kind: type[T], default: T | object = _MISSING) -> T:
    """Returns the value of a field, or the default if the field is missing or null.

    Raises UserError if the value is not of type `kind`, or if it is missing and has no default.
    """
    self._read.add(name)
    value = self.values.get(name)
    if value is None:
      if default is _MISSING:
        raise UserError(f'{self.where} has no {name}; valid: the config.json of a whole model')
      return default
    try:
      records.check(value, kind, name)
    except ValueError as error:
      raise UserError(f'{self.where}: {error}; valid: the config.json of a whole model') from None
    return kind(value)

  def only(self, name: str, default: Json, *valid: Json) -> None:
    """Raises UserError unless a field, or its default, has one of the valid values."""
    self._read.add(name)
    found = self.values.get(name, default)
    text = ' or '.join(repr(value) for value in valid)
    require(
      found in valid, f'{self.where}: {name}', found, f'{text}, which is what this project computes'
    )

  def skip(self, *names: str) -> None:
    """Marks fields as read, so that `finish` accepts them."""
    self._read.update(names)

  def inner(self, name: str) -> 'Fields':
    """Returns the fields of a nested object; if the object is missing, there are no fields."""
    return Fields(self.take(name, dict, {}), f'{self.where}: {name}')

  def finish(self) -> None:
    """Raises UserError for fields that were not read, except empty, zero, False and `HARMLESS` ones."""
    for name, value in self.values.items():
      known = name in self._read or any(fnmatch.fnmatch(name, one) for one in HARMLESS)
      if not known and value not in (None, False, '', [], {}):
        raise UserError(
          f'{self.where}: the field {name}={value!r} is not supported, and it may change what the model '
          'computes; valid: a model without it'
        )
