"""Loading configs: a config file, defaults of its methods, and overrides from the command line.

A config is a Python file whose `get_config()` returns an `ml_collections.ConfigDict`. The fields of a
slot depend on its method. So the names of methods are overridden first, then the defaults of these
methods are merged, and then all other overrides are applied. `config_flags` cannot do this in one pass.
"""

import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from ml_collections import ConfigDict

from sparse_lm.core import ranges
from sparse_lm.core.errors import UserError, listed, located, require, unknown
from sparse_lm.core.ranges import FieldValue
from sparse_lm.core.records import Json, JsonObject
from sparse_lm.core.version import VERSION
from sparse_lm.model import slots
from sparse_lm.runs.config_names import instead_of_method
from sparse_lm.runs.config_values import convert, wrong_type
from sparse_lm.runs.inherited import inherit

BASE = pathlib.Path(__file__).parents[2] / 'configs' / 'base.py'
# Fields of former versions, and the fields that replaced them.
REPLACED = {
  'model.dtype': 'config.model.precision',
  'model.param_dtype': 'config.model.weights_dtype; config.model.precision is that of the computation',
}

# Values by dotted name, such as {'weight.sparsity': 0.9}. Strings are converted to the field's type.
Overrides = Mapping[str, FieldValue]
# The fields of a group by name, and the groups within it.
Group = dict[str, 'FieldValue | Group | None']


def load(path: str, overrides: Overrides | None = None) -> ConfigDict:
  """Loads a config file as a locked config. With `init_from` it inherits fields (`inherited.py`).

  Args:
    path: the Python file. A relative path that does not exist in the working folder is looked up in the
      folder that contains the package, so 'configs/rigl.py' is found from everywhere.
    overrides: values by dotted name, such as `{'weight.sparsity': 0.9}`. Strings are converted to the
      type of the value that they replace.

  Raises:
    UserError: the file, a field or a method does not exist, the file fails, or a value has the wrong type
      or lies outside its range.
  """
  config, overrides = _read(path), dict(overrides or {})
  inherit(config, overrides, _read(str(BASE)))
  return _overridden(config, overrides, path)


def derive(config: ConfigDict, overrides: Overrides, allowed: tuple[str, ...]) -> ConfigDict:
  """Returns a complete config with overrides. If an override names another method, the fields of the old
  method are dropped.

  Raises UserError for an override outside the groups `allowed`, and as `load` does.
  """
  for field in overrides:
    if field.partition('.')[0] not in allowed:
      valid = [f'config.{path}' for path in flat(config) if path.partition('.')[0] in allowed]
      raise unknown('field to override here', f'config.{field}', valid)
  config = config.copy_and_resolve_references().unlock()
  for _, group, node in _methods(config):
    if overrides.get(f'{group}.name', node.name) != node.name:
      for key in slots.fields(node):
        del node[key]
  return _overridden(config, dict(overrides), 'the run')


def _overridden(config: ConfigDict, overrides: Overrides, path: str) -> ConfigDict:
  """Merges the defaults of all methods and applies overrides.

  Rules come last, because a rule starts from the values of its slot.
  """
  of_rules = {field: value for field, value in overrides.items() if '.rules.' in field}
  of_slots = {field: value for field, value in overrides.items() if field not in of_rules}
  given = _rules_of_file(config)
  _apply(config, list(_methods(config)), of_slots, path)
  for slot, rules in given.items():
    _add_rules(slot, config[slot], rules, of_rules)
  ruled = [found for found in _methods(config) if '.rules.' in found[1]]
  _apply(config, ruled, of_rules, path)
  _check_inner(config, overrides)
  check(config)
  return config.lock()


def _apply(
  config: ConfigDict,
  methods: list[tuple[str, str, ConfigDict]],
  overrides: Overrides,
  path: str,
) -> None:
  """Merges the defaults of these groups' methods and applies overrides.

  The names of methods come first, because the other fields depend on them.
  """
  names = {f'{group}.name': (group, node) for _, group, node in methods}
  for field, (group, node) in names.items():
    _merge_defaults(node, group, overrides.get(field, node.name), path)
  for field, value in overrides.items():
    if field not in names:
      _override(config, field, value)


def _rules_of_file(config: ConfigDict) -> dict[str, ConfigDict]:
  """Removes the rules of all slots from the config and returns them. They are merged after the slots."""
  given = {}
  for slot in slots.SLOTS:
    if 'order' in slots.SLOT_KEYS[slot] and isinstance(config.get(slot), ConfigDict):
      given[slot] = ConfigDict(config[slot].get('rules', {}))
      config[slot].rules = ConfigDict()
  return given


def _add_rules(slot: str, node: ConfigDict, given: ConfigDict, overrides: Overrides) -> None:
  """Adds the rules that `order` names. Each starts from the slot's values and then takes the file's.

  Raises UserError if `order` names a rule twice, or if the file has a rule that `order` does not name.
  """
  field = f'config.{slot}.order'
  names = [name for name in node.order if isinstance(name, str) and name.isidentifier()]
  valid = "different names such as ('mlp', 'attention')"
  require(len({*names}) == len(node.order), field, tuple(node.order), valid)
  if left := [name for name in given if name not in names]:
    raise unknown(f'rule in {field}={tuple(node.order)}:', left[0], names)
  for name in names:
    own, group = given.get(name, ConfigDict()), f'{slot}.rules.{name}'
    rule = ConfigDict({key: node[key] for key in slots.RULE_KEYS[slot] if key in node})
    if 'inner' in rule:
      rule.inner = _begun(node.inner, own.get('inner', ConfigDict()), f'{group}.inner', overrides)
    rule.update(_begun(node, own, group, overrides))
    node.rules[name] = ConfigDict({'match': (name,)} if slot == 'weight' else {})
    node.rules[name].update(rule)


def _begun(
  node: ConfigDict, own: ConfigDict, group: str, overrides: Overrides
) -> dict[str, FieldValue]:
  """Returns the method of a rule and its fields. The slot's fields are defaults for the same method."""
  name = overrides.get(f'{group}.name', own.get('name', node.name))
  fields = slots.fields(node) if name == node.name else {}
  return {**fields, **{key: own[key] for key in own if key != 'inner'}, 'name': name}


def _check_inner(config: ConfigDict, overrides: Overrides) -> None:
  """Raises UserError for an override of `inner` in a method that wraps no other method."""
  for slot, group, node in _methods(config):
    asked = next((field for field in overrides if field.startswith(f'{group}.inner.')), None)
    if asked and not slots.wraps(slot, node.name):
      wrapping = [name for name in slots.names(slot) if slots.wraps(slot, name)]
      raise UserError(
        f'config.{asked}={overrides[asked]!r}: config.{group}.name={node.name!r} wraps no other method; '
        f'valid: a method that does ({", ".join(wrapping) or "there is none in this slot"})'
      )


def check(config: ConfigDict) -> None:
  """Raises UserError for a number that is missing or outside its range, for a field of a former version,
  and for a field that `configs/base.py` does not have."""
  values = flat(config)
  _refuse_replaced(values)
  known = _base_fields()
  for field in values:
    group = field.partition('.')[0]
    if group not in slots.SLOTS and field not in known:  # only slots have fields of methods
      raise unknown('field', f'config.{field}', [f'config.{name}' for name in known])
  for field, range_ in ranges_of(config).items():
    if field not in values:
      raise _missing(field)
    range_.require(f'config.{field}', values[field])


@functools.cache
def _base_fields() -> tuple[str, ...]:
  """Returns the dotted names of the fields of `configs/base.py`."""
  return tuple(flat(_read(str(BASE))))


def _refuse_replaced(fields: Iterable[str]) -> None:
  for field in REPLACED.keys() & fields:
    raise UserError(f'config.{field} is not a field any more; valid: {REPLACED[field]}')


def ranges_of(config: ConfigDict) -> dict[str, ranges.Range]:
  """Returns the range of every numeric field of the config, by dotted name."""
  found = dict(ranges.BASE_FIELDS)
  for slot, group, node in _methods(config):
    own = ranges.of_fields(slots.method(slot, node.name, f'config.{group}.name'))
    found |= {f'{group}.{key}': range_ for key, range_ in own.items()}
    if _is_rule(group):  # the sparsity of a rule has the range of the slot's sparsity, for example
      shared = {key: ranges.BASE_FIELDS.get(f'{slot}.{key}') for key in slots.RULE_KEYS[slot]}
      found |= {f'{group}.{key}': range_ for key, range_ in shared.items() if range_}
  return found


def _methods(config: ConfigDict) -> Iterator[tuple[str, str, ConfigDict]]:
  """Yields the slot, dotted name and contents of every group that names a method."""
  for slot in slots.SLOTS:
    for key in slots.SLOT_KEYS[slot]:
      if not isinstance(config.get(slot), ConfigDict) or key not in config[slot]:
        raise _missing(f'{slot}.{key}')
    for group, node in slots.groups(slot, config):
      yield slot, group, node


def _is_rule(group: str) -> bool:
  """True if a group is one of `config.<slot>.rules`. The `inner` group of a rule is not."""
  return group.split('.')[-2:-1] == ['rules']


def _missing(field: str) -> UserError:
  return UserError(
    f'the config has no config.{field}; valid: a config that starts from configs.base.get_config()'
  )


def to_json(config: ConfigDict) -> JsonObject:
  """Converts a config to plain JSON values. Tuples become lists."""
  return json.loads(config.to_json())


def from_json(values: JsonObject) -> ConfigDict:
  """The inverse of `to_json`."""

  def plain(value: Json) -> FieldValue | Group | None:
    if isinstance(value, list):
      return tuple(plain(item) for item in value)
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

  return ConfigDict(plain(values)).lock()


def of_run(values: JsonObject, path: pathlib.Path) -> ConfigDict:
  """Returns the config of a run from the values of its config.json at `path`.

  A field that joined `configs/base.py` or the class of a method after the file was written takes its
  default, which therefore must change nothing. Only the keys of slots (`slots.SLOT_KEYS`) must be there.

  Raises UserError if one of them is missing, or if a value has the wrong type or lies outside its range,
  because another version wrote the file.
  """
  config = from_json(values).unlock()
  try:
    shared = _shared_defaults()
    _complete(config, {f: v for f, v in shared.items() if f.partition('.')[0] not in slots.SLOTS})
    _check_types(config, shared)
    for slot, group, node in _methods(config):
      own = slots.defaults(slot, node.name, f'config.{group}.name')
      _complete(config, {f'{group}.{key}': default for key, default in own.items()})
      if _is_rule(group):
        own |= {
          key: config[slot].get(key, ('',)) for key in slots.RULE_KEYS[slot] if key != 'inner'
        }
      _check_types(config, {f'{group}.{key}': default for key, default in own.items()})
    check(config)
  except UserError as error:
    raise UserError(f'{path} does not fit this version, sparse_lm {VERSION}: {error}') from None
  return config.lock()


def _complete(config: ConfigDict, defaults: dict[str, FieldValue]) -> None:
  """Adds the fields that are missing in a group of the config."""
  for field, default in defaults.items():
    *groups, last = field.split('.')
    node = config
    for group in groups:
      node = node.get(group) if isinstance(node, ConfigDict) else None
    if isinstance(node, ConfigDict) and last not in node:
      node[last] = default


def _shared_defaults() -> dict[str, FieldValue]:
  """Returns the defaults of the fields that every config has, independent of its methods."""

  def shared(field: str) -> bool:
    slot, last = field.partition('.')[0], field.rpartition('.')[2]
    return slot not in slots.SLOTS or last in slots.SLOT_KEYS[slot]

  return {field: value for field, value in flat(_read(str(BASE))).items() if shared(field)}


def _check_types(config: ConfigDict, defaults: dict[str, FieldValue]) -> None:
  fields = flat(config)
  for field, default in defaults.items():
    if field not in fields:
      raise _missing(field)
    if isinstance(fields[field], str) != isinstance(default, str):
      raise wrong_type(field, fields[field], default)
    convert(field, fields[field], default)


def flat(values: JsonObject | ConfigDict, prefix: str = '') -> dict[str, Json | FieldValue]:
  """Flattens `{'weight': {'name': 'set'}}` to `{'weight.name': 'set'}`."""
  out = {}
  for key, value in values.items():
    nested = isinstance(value, dict | ConfigDict)
    out |= flat(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return out


def _read(path: str) -> ConfigDict:
  given = pathlib.Path(os.path.expanduser(path))
  file = given if given.is_file() else BASE.parents[1] / given
  if not file.is_file():
    near = given.parent.is_dir()
    names = [f.name for f in (given if near else BASE).parent.glob('*.py') if f.stem != '__init__']
    folder = given.parent if near else pathlib.Path(BASE.parent.name)
    raise unknown('config file', path, [str(folder / name) for name in names])
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    get_config = vars(module).get('get_config')
    if get_config is None:
      raise UserError(f'config file {path} defines no get_config()')
    config = get_config()
  except UserError:
    raise
  except Exception as error:
    raise UserError(f'config file {path} {located(error, str(file))}') from error
  if not isinstance(config, ConfigDict):
    raise UserError(
      f'config file {path}: get_config() returns a value of type {type(config).__name__}; valid: a '
      'ConfigDict that starts from configs.base.get_config()'
    )
  return config


def _merge_defaults(config: ConfigDict, group: str, name: str, path: str) -> None:
  """Adds the fields of the method `name` to `config`, a group such as 'mlp' or 'mlp.fallback'."""
  slot, field = group.partition('.')[0], f'config.{group}.name'
  if name not in (valid := slots.names(slot)) and (BASE.parent / f'{name}.py').is_file():
    given, default = _read(str(BASE.parent / f'{name}.py')), _read(str(BASE))
    if error := instead_of_method(field, name, valid, given[slot], default[slot]):
      raise error
  defaults = slots.defaults(slot, name, field)
  config.name = name
  for key in slots.fields(config):
    if key not in defaults:
      valid = [*defaults, *(slots.RULE_KEYS if _is_rule(group) else slots.SLOT_KEYS)[slot]]
      raise unknown(f'field of method {name!r} in {path}: config.{group}', key, valid)
  with config.unlocked(), config.ignore_type():
    for key, value in defaults.items():
      config[key] = convert(f'{group}.{key}', config.get(key, value), value)


def _override(config: ConfigDict, field: str, value: object) -> None:
  _refuse_replaced((field,))
  *parents, last = field.split('.')
  node = config
  for depth, key in enumerate([*parents, last]):
    if not isinstance(node, ConfigDict) or key not in node:
      group = '.'.join(parents[:depth]) if isinstance(node, ConfigDict) else ''
      known = [f'config.{path}' for path in flat(config) if path.startswith(group)]
      raise unknown('field', f'config.{field}', known)
    node = node[key] if depth < len(parents) else node
  if isinstance(node[last], ConfigDict):
    raise UserError(f'config.{field} is a group of fields; valid: {listed([*flat(node[last])])}')
  node[last] = convert(field, value, node[last])
