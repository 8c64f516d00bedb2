"""Copies fields to a config from the config of its parent, the run that `config.init_from` names."""

from ml_collections import ConfigDict

from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import FieldValue
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.data.hf_tokenizer import KIND
from sparse_lm.model import slots
from sparse_lm.runs.config_values import convert
from sparse_lm.runs.run_folder import folder_of, read_config

# The fields of `config.data` that choose the text and its tokenizer.
TEXT = ('source', 'path', 'split', 'tokenizer', 'vocab_size')

# Fields of `config.model` that are not inherited.
_OWN = ('dropout', 'precision', 'attention_kernel', 'remat', 'scan_layers')


def inherit(config: ConfigDict, overrides: dict[str, FieldValue], default: ConfigDict) -> None:
  """Copies fields to a config from the config of its parent.

  A run inherits `config.data`, so that it reads the same tokens as its parent. If the parent is an
  imported model or descends from one, the run also inherits `config.model` and the methods of the layers
  and sites: some of their fields, such as `rope_base`, change the function of a model but no shape of a
  parameter.

  A field is not inherited if an override sets it, or if the config file changes it from
  `configs/base.py`; in `config.data` the second rule holds only for the fields of `TEXT`. If the parent
  has no config, nothing is copied, and an error is raised when the run is set up.

  Args:
    config: the config of the file, which is changed.
    overrides: values by dotted name, which are not applied yet.
    default: the config of `configs/base.py`.
  """
  parent = overrides.get('init_from', config.get('init_from', ''))
  if not (parent and isinstance(parent, str) and isinstance(config.get('data'), ConfigDict)):
    return  # errors are raised when the overrides are applied
  saved = _saved(parent)
  data = saved.get('data')
  if not isinstance(data, dict):
    return
  for field, value in data.items():
    told = field in TEXT and config.data.get(field) != default.data[field]
    if field in config.data and not told and f'data.{field}' not in overrides:
      config.data[field] = convert(f'data.{field}', value, config.data[field])
  if data.get('tokenizer') == KIND and isinstance(saved.get('model'), dict):
    _inherit_model(config, overrides, default, saved)


def _inherit_model(
  config: ConfigDict, overrides: dict[str, FieldValue], default: ConfigDict, saved: JsonObject
) -> None:
  """Copies all but `config.data`, except fields that the file or an override sets."""
  for field, value in saved['model'].items():
    untold = field in config.model and config.model[field] == default.model[field]
    if untold and field not in _OWN and f'model.{field}' not in overrides:
      config.model[field] = convert(f'model.{field}', value, config.model[field])
  for slot in (*slots.LAYER_SLOTS, 'site'):
    theirs, given = saved.get(slot), config.get(slot)
    untold = isinstance(given, ConfigDict) and given == default[slot]
    if untold and isinstance(theirs, dict) and f'{slot}.name' not in overrides:
      config[slot] = ConfigDict(_plain(theirs))


def _saved(workdir: str) -> JsonObject:
  try:
    return read_config(folder_of(workdir)[0])
  except UserError:
    return {}


def _plain(value: Json) -> Json | tuple[Json, ...]:
  """Returns a value of a config.json with tuples in place of lists."""
  if isinstance(value, list):
    return tuple(_plain(item) for item in value)
  return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
