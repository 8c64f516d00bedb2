"""Reading a foreign config field by field, so that no field that changes the model is overlooked."""

import dataclasses
import fnmatch
from typing import TypeVar

from sparse_lm.core import records
from sparse_lm.core.errors import UserError, require
from sparse_lm.core.records import Json, JsonObject

# Fields, by shell patterns, that do not change the function of a model in evaluation.
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
    """Returns a field of a type. Without a default, the field must be there.

    A field that is null counts as missing. Raises UserError if the field is missing or of another type.
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
    """Marks fields that other fields have switched off."""
    self._read.update(names)

  def inner(self, name: str) -> 'Fields':
    """Returns the fields of a nested object, none if it is missing."""
    return Fields(self.take(name, dict, {}), f'{self.where}: {name}')

  def finish(self) -> None:
    """Raises UserError if a field was not read, unless it is off or harmless."""
    for name, value in self.values.items():
      known = name in self._read or any(fnmatch.fnmatch(name, one) for one in HARMLESS)
      if not known and value not in (None, False, '', [], {}):
        raise UserError(
          f'{self.where}: the field {name}={value!r} is not supported, and it may change what the model '
          'computes; valid: a model without it'
        )
