"""What JSON holds: declared as a type, checked when it is read, and sealed by a digest of its content.

A form is a type: `str`, `bool`, `int` (of 64 bits), `float` (whole numbers too), `None`, a union,
`list[form]`, `dict[str, form]`, a `TypedDict`, beside whose keys there may be others, or `object`, which
admits any value. So a damaged file ends in one line where it is read, and not in a traceback, or in
other numbers, where it is used.
"""

import hashlib
import json
import pathlib
import types
import typing
from collections.abc import Iterator

from sparse_lm.core.errors import UserError
from sparse_lm.core.version import BEFORE, VERSION

# JSON values.
Json = None | bool | int | float | str | list['Json'] | dict[str, 'Json']
JsonObject = dict[str, Json]
# What declares them; see above.
Form = type | types.UnionType | types.GenericAlias | None
OBJECT: Form = dict[str, object]  # an object with any values

SEAL = 'content_sha256'
LARGEST = 2**26  # bytes of a file that is read as a whole

_NAMES = {dict: 'an object', list: 'a list', str: 'a string', bool: 'true or false'}
_NAMES |= {int: 'a whole number', float: 'a number', type(None): 'null'}


def digest(values: Json) -> str:
  """sha256 (hex) of the canonical JSON of `values`: no white space, keys in their order."""
  plain = json.loads(json.dumps(values))  # tuples become lists, and all keys strings
  canonical = json.dumps(plain, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(canonical.encode()).hexdigest()


def seal(values: JsonObject) -> JsonObject:
  """The values and, as `content_sha256`, their `digest`."""
  return values | {SEAL: digest(values)}


def unseal(values: JsonObject) -> JsonObject:
  """What `seal` was given. Raises `ValueError` where it was changed since."""
  content = {name: value for name, value in values.items() if name != SEAL}
  if values[SEAL] != digest(content):
    raise ValueError(f'it was changed since it was written: its {SEAL} differs')
  return content


def sealed(values: JsonObject) -> str:
  """The text of a JSON file with the sealed `values`."""
  return json.dumps(seal(values), indent=2) + '\n'


def read(path: pathlib.Path, form: Form) -> Json:
  """The values of a JSON file that `sealed` made, of the given form and without their digest.

  Raises UserError, naming the file, where it cannot be read, is no JSON, has another form, or was
  changed since it was written.
  """
  try:
    size = path.stat().st_size
    data = path.read_bytes() if path.is_file() and size <= LARGEST else None
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); valid: a whole folder') from None
  try:
    if data is None:
      raise ValueError(f'{size} bytes, more than {LARGEST}' if size > LARGEST else 'it is no file')
    values = parse(data, OBJECT)
    if SEAL not in values:
      raise UserError(
        f'{path} has no {SEAL}: it was changed, or written by sparse_lm {BEFORE}, and this is sparse_lm '
        f'{VERSION}; valid: an unchanged copy of it, or the version that wrote it'
      )
    values = unseal(values)
    check(values, form)
  except ValueError as error:
    raise UserError(f'{path} is damaged ({error}); valid: an unchanged copy of it') from None
  return values


def read_lines(path: pathlib.Path, form: Form) -> Iterator[tuple[int, bytes, Json, str]]:
  """For each line of a file that is not blank: its number, text, values, and what is wrong with it.

  Where something is, the values are `None`.
  """
  with path.open('rb') as file:
    for number, text in enumerate(file, start=1):
      if text.strip():
        try:
          yield number, text, parse(text, form), ''
        except ValueError as error:
          yield number, text, None, str(error)


def parse(text: bytes, form: Form) -> Json:
  """The values of JSON in UTF-8. Raises `ValueError` where it is none, or they have another form."""
  try:
    values = json.loads(text)
    check(values, form)
  except UnicodeDecodeError as error:
    raise ValueError(f'byte {error.start} is not UTF-8') from None
  except RecursionError:
    raise ValueError('it is nested too deeply') from None
  return values


def check(value: Json, form: Form, where: str = '') -> None:
  """Raises `ValueError`, naming the place, where a JSON value does not have the form."""
  origin, arguments = typing.get_origin(form), typing.get_args(form)
  if form is object:
    return
  if origin in (typing.Union, types.UnionType):
    _check_union(value, arguments, where)
  elif typing.is_typeddict(form):
    _expect(value, dict, where)
    if missing := sorted(form.__required_keys__ - value.keys()):
      raise ValueError(f'{where or "it"} has no {missing[0]!r}')
    for name, part in typing.get_type_hints(form).items():
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
    _expect(value, form, where)


def _check_union(value: Json, forms: tuple[Form, ...], where: str) -> None:
  faults = []
  for form in forms:
    try:
      return check(value, form, where)
    except ValueError as error:
      faults.append(str(error))
  raise ValueError('; '.join(faults))


def _expect(value: Json, kind: type, where: str) -> None:
  allowed = (int, float) if kind is float else kind
  fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
  if fits and isinstance(value, int):  # of any size in JSON
    fits = abs(value) < (2**63 if kind is int else 2**1023)
  if not fits:
    shown = _NAMES[type(value)] if isinstance(value, dict | list) else repr(value)[:40]
    raise ValueError(f'{where[:100] or "it"} is {shown} and not {_NAMES[kind]}')
