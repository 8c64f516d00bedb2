"""JSON files with a declared schema and a digest of their content; both are checked on reading.

A schema is a type: `str`, `bool`, `int` (64 bits), `float` (whole numbers included), `None`, a union,
`list[schema]`, `dict[str, schema]`, a `TypedDict` (other keys are allowed), or `object` for any value.
A damaged file therefore gives a one-line error when it is read, instead of a traceback or wrong numbers
later.
"""

import hashlib
import json
import pathlib
import types
import typing
from collections.abc import Iterator

from sparse_lm.core.errors import UserError
from sparse_lm.core.version import UNMARKED_VERSION, VERSION

# JSON values.
Json = None | bool | int | float | str | list['Json'] | dict[str, 'Json']
JsonObject = dict[str, Json]
# The type that declares JSON values; see above.
Schema = type | types.UnionType | types.GenericAlias | None
OBJECT: Schema = dict[str, object]  # an object with any values

SEAL = 'content_sha256'
LARGEST = 2**26  # bytes; larger files are refused

_NAMES = {dict: 'an object', list: 'a list', str: 'a string', bool: 'true or false'}
_NAMES |= {int: 'a whole number', float: 'a number', type(None): 'null'}


def digest(values: Json) -> str:
  """Returns the SHA-256 (hex) of the canonical JSON of `values`: no white space, keys sorted."""
  plain = json.loads(json.dumps(values))  # tuples become lists, and all keys strings
  canonical = json.dumps(plain, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(canonical.encode()).hexdigest()


def seal(values: JsonObject) -> JsonObject:
  """Returns the values with their `digest` under the key `content_sha256`."""
  return values | {SEAL: digest(values)}


def unseal(values: JsonObject) -> JsonObject:
  """Returns sealed values without their digest. Raises `ValueError` if they do not match the digest."""
  content = {name: value for name, value in values.items() if name != SEAL}
  if values[SEAL] != digest(content):
    raise ValueError(f'it was changed since it was written: its {SEAL} differs')
  return content


def sealed(values: JsonObject) -> str:
  """Returns the text of a JSON file that holds `values` and their digest."""
  return json.dumps(seal(values), indent=2) + '\n'


def read(path: pathlib.Path, schema: Schema) -> Json:
  """Reads a JSON file whose text came from `sealed`; returns its values without the digest.

  Raises:
    UserError: the file cannot be read, is not JSON, does not match the schema, or was changed after it
      was written. The message names the file.
  """
  try:
    size = path.stat().st_size
    data = path.read_bytes() if path.is_file() and size <= LARGEST else None
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); valid: a complete folder') from None
  try:
    if data is None:
      raise ValueError(
        f'{size} bytes, more than {LARGEST}' if size > LARGEST else 'it is not a file'
      )
    values = parse(data, OBJECT)
    if SEAL not in values:
      raise UserError(
        f'{path} has no {SEAL}: it was changed, or sparse_lm {UNMARKED_VERSION} wrote it, and this is '
        f'sparse_lm {VERSION}; valid: an unchanged copy of it, or the version that wrote it'
      )
    values = unseal(values)
    check(values, schema)
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None
  return values


def read_lines(path: pathlib.Path, schema: Schema) -> Iterator[tuple[int, bytes, Json, str]]:
  """Yields (number, text, values, error) for each line of a file that is not blank.

  `error` is '' for a valid line. For other lines it is the reason, and `values` is `None`.
  """
  with path.open('rb') as file:
    for number, text in enumerate(file, start=1):
      if text.strip():
        try:
          yield number, text, parse(text, schema), ''
        except ValueError as error:
          yield number, text, None, str(error)


def parse(text: bytes, schema: Schema) -> Json:
  """Parses JSON in UTF-8. Raises `ValueError` if it is not JSON or does not match the schema."""
  try:
    values = json.loads(text)
    check(values, schema)
  except UnicodeDecodeError as error:
    raise ValueError(f'byte {error.start} is not UTF-8') from None
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  return values


def check(value: Json, schema: Schema, where: str = '') -> None:
  """Raises a `ValueError` that says where, if a JSON value does not match the schema."""
  origin, arguments = typing.get_origin(schema), typing.get_args(schema)
  if schema is object:
    return
  if origin in (typing.Union, types.UnionType):
    _check_union(value, arguments, where)
  elif typing.is_typeddict(schema):
    _expect(value, dict, where)
    if missing := sorted(schema.__required_keys__ - value.keys()):
      raise ValueError(f'{where or "it"} has no {missing[0]!r}')
    for name, part in typing.get_type_hints(schema).items():
      if name in value:
        check(value[name], part, f'{where}.{name}'.lstrip('.'))
  elif origin is dict:
    _expect(value, dict, where)
    for name, part in value.items():
      check(part, arguments[1], f'{where}.{name}'.lstrip('.'))
  elif origin is list:
    _expect(value, list, where)
    for number, part in enumerate(value):
      check(part, arguments[0], f'{where}[{number}]')
  else:
    _expect(value, schema, where)


def _check_union(value: Json, schemas: tuple[Schema, ...], where: str) -> None:
  faults = []
  for schema in schemas:
    try:
      return check(value, schema, where)
    except ValueError as error:
      faults.append(str(error))
  raise ValueError('; '.join(faults))


def _expect(value: Json, kind: type, where: str) -> None:
  allowed = (int, float) if kind is float else kind
  fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
  if fits and isinstance(value, int):  # JSON has no largest int
    fits = abs(value) < (2**63 if kind is int else 2**1023)
  if not fits:
    shown = _NAMES[type(value)] if isinstance(value, dict | list) else repr(value)[:40]
    raise ValueError(f'{where[:100] or "it"} is {shown} and not {_NAMES[kind]}')
