"""Ways to damage a file: its bytes, its lines, its JSON, or its place in the folder."""

import json
import os
import pathlib
import random
import shutil
from typing import Any

TRAP = 'fuzz_trap.Trap'  # of a module that leaves a mark where it is imported
_JSON = (
  None, True, False, 0, 1, -1, 0.5, 2**31, 2**63, 10**18, 10**400, 1e300, '', 'a', '1', '0.5', TRAP,
  '../x', 'sparse_lm.core', 3000 * 'a', '\udcff', [], {}, [1, 2], [[]], {'a': 1}, ['a', None],
  float('nan'), float('inf'),
)  # fmt: skip


def damage(path: pathlib.Path, draw: random.Random) -> str:
  """Damages the file at `path` and returns how, for people."""
  ways = [_place, _bytes, _bytes, _bytes, _cut, _cut]
  if path.suffix == '.json' or path.name.startswith('_'):
    ways += 8 * [_json]
  if path.suffix in ('.jsonl', '.txt', '.py'):
    ways += 6 * [_lines]
  if path.suffix == '.jsonl':
    ways += 6 * [_json_line]
  return draw.choice(ways)(path, draw)


def _place(path: pathlib.Path, draw: random.Random) -> str:
  """Something else stands where the file stood."""
  kind = draw.choice(('missing', 'folder', 'loop', 'dangling', 'empty', 'parent is missing'))
  if kind == 'parent is missing' and len(path.parts) > 1:
    shutil.rmtree(path.parent)
    return kind
  path.unlink()
  if kind == 'folder':
    path.mkdir()
  elif kind == 'loop':
    path.symlink_to(path)
  elif kind == 'dangling':
    path.symlink_to(path.with_name('nowhere'))
  elif kind == 'empty':
    path.touch()
  return kind


def _bytes(path: pathlib.Path, draw: random.Random) -> str:
  """Some bytes are others."""
  data = bytearray(path.read_bytes() or b'\n')
  at, count = draw.randrange(len(data)), draw.choice((1, 1, 1, 1, 4, 64, 1000))
  kind = draw.choice(('bit', 'bit', 'digit', 'digit', 'random', 'zeros', 'invalid UTF-8', 'insert'))
  digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
  if kind == 'bit':
    data[at] ^= 1 << draw.randrange(8)
  elif kind == 'digit' and digits:
    at = draw.choice(digits)
    data[at] = ord(draw.choice(sorted(set('0123456789') - {chr(data[at])})))
  elif kind == 'insert':
    data[at:at] = draw.randbytes(count)
  else:
    new = {'zeros': bytes(count), 'invalid UTF-8': b'\xff' * count}.get(kind, draw.randbytes(count))
    data[at : at + count] = new[: len(data) - at]
  path.write_bytes(data)
  return f'{kind} at byte {at}, {count}'


def _cut(path: pathlib.Path, draw: random.Random) -> str:
  """The end is missing, or goes on."""
  data = path.read_bytes()
  kind = draw.choice(('cut', 'cut', 'longer', 'twice', 'without the start'))
  at = draw.choice((draw.randrange(len(data) + 1), max(len(data) - 1, 0)))
  changed = {
    'cut': data[:at],
    'longer': data + draw.choice((b'\0', b'\n', b'}', draw.randbytes(100))),
    'twice': data + data,
    'without the start': data[at:],
  }
  path.write_bytes(changed[kind])
  return f'{kind} at byte {at}'


def _lines(path: pathlib.Path, draw: random.Random) -> str:
  """Lines of text are gone, moved, repeated, indented or ended otherwise."""
  lines = path.read_bytes().split(b'\n')
  kind = draw.choice(('drop', 'repeat', 'swap', 'CRLF', 'indent', 'other', 'byte order mark'))
  a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
  others = (
    b'\0',
    b'}{',
    b'[1, 2]',
    b'5',
    b'\xff\xfe',
    b'null',
    b'return 5',
    b'  x =',
    10**5 * b'[',
  )
  if kind == 'drop':
    del lines[a]
  elif kind == 'repeat':
    lines.insert(a, lines[b])
  elif kind == 'swap':
    lines[a], lines[b] = lines[b], lines[a]
  elif kind == 'indent':
    lines[a] = b'   ' + lines[a]
  elif kind == 'other':
    lines[a] = draw.choice(others)
  start = b'\xef\xbb\xbf' if kind == 'byte order mark' else b''
  path.write_bytes(start + (b'\r\n' if kind == 'CRLF' else b'\n').join(lines))
  return f'{kind} in lines {a} and {b}'


def _json_line(path: pathlib.Path, draw: random.Random) -> str:
  lines = path.read_text().splitlines()
  at = draw.randrange(len(lines))
  lines[at], how = _other_json(lines[at], draw)
  path.write_bytes(('\n'.join(lines) + '\n').encode(errors='surrogatepass'))
  return f'line {at}: {how}'


def _json(path: pathlib.Path, draw: random.Random) -> str:
  try:
    text, how = _other_json(path.read_text(), draw)
  except (ValueError, UnicodeDecodeError):  # a file of another kind with such a name
    return _bytes(path, draw)
  path.write_bytes(text.encode(errors='surrogatepass'))
  return how


def _other_json(text: str, draw: random.Random) -> tuple[str, str]:
  """JSON with one value, key or list changed, and how."""
  whole = {'': json.loads(text)}  # the top is a value like the others
  holder, key, path = whole, '', ''
  while draw.random() < 0.75 and isinstance(holder[key], dict | list) and holder[key]:
    holder = holder[key]
    key = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    path += f'/{key}'
  value = holder[key]
  kind = draw.choice(('value', 'value', 'value', 'near', 'near', 'lost', 'more', 'renamed', 'deep'))
  if kind == 'near':
    holder[key] = _near(value, draw)
  elif kind == 'lost' and holder is not whole:
    del holder[key]
  elif kind == 'more' and isinstance(value, dict | list):
    extra = draw.choice(_JSON)
    if isinstance(value, dict):
      value[draw.choice(('a', '', 'name', 'sparsity'))] = extra
    else:
      value.append(extra)
  elif kind == 'renamed' and isinstance(holder, dict) and holder is not whole:
    holder[draw.choice((key + 's', '', key.upper(), f'a/{key}'))] = holder.pop(key)
  elif kind == 'deep':
    mark = '"<deep>"'
    holder[key] = '<deep>'
    depth = draw.choice((5, 2000, 10**5))
    return json.dumps(whole['']).replace(mark, depth * '[' + depth * ']'), f'{kind} at {path}'
  else:
    holder[key] = draw.choice(_JSON)
  return json.dumps(whole[''], indent=2 if '\n' in text.strip() else None), f'{kind} at {path}'


def _near(value: Any, draw: random.Random) -> Any:
  """A value of the same type that is not the same."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return draw.choice((value + 1, value - 1, -value, 2 * value, value * 10**9))
  if isinstance(value, float):
    return draw.choice((value * 1.001, -value, value / 2, 1 - value, value + 1e-9))
  if isinstance(value, str) and value:
    at = draw.randrange(len(value))
    return value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
  if isinstance(value, list):
    return draw.sample(value, len(value)) if len(value) > 1 else [*value, *value]
  return draw.choice(_JSON)


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files in a folder, at any depth, sorted."""
  return sorted(pathlib.Path(root, name) for root, _, names in os.walk(folder) for name in names)
