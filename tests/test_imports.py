"""Reads every module's imports, and holds them to the layout."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

MODULES = sorted(
  str(path.relative_to(ROOT))
  for folder in ('sparse_lm', 'experiments')
  for path in (ROOT / folder).rglob('*.py')
)

# The rooms from the ground up. A file imports from its own room and from rooms above it in this list;
# `methods` are one room for each slot, and none of them imports another.
ROOMS = (
  'kernels',
  'core',
  'measure',
  'patterns',
  'signals',
  'plan',
  'weights',
  'layers',
  'methods',
  'model',
  'data',
  'train',
  'inference',
  'evals',
  'runs',
  'convert',
  'report',
  'commands',
  '',  # entry points at the top of the package
)
# What a room does without, though it lies lower.
NOT = {
  'data': (
    'kernels',
    'measure',
    'patterns',
    'signals',
    'plan',
    'weights',
    'layers',
    'methods',
    'model',
  ),
  'layers': ('patterns', 'signals', 'weights'),
  'methods': ('patterns', 'signals'),
  **dict.fromkeys(ROOMS[ROOMS.index('model') :], ('methods',)),
}
# Modules that `python -m` runs may use what commands share.
ENTRIES = (
  'sparse_lm/convert/__main__.py',
  'sparse_lm/data/prepare.py',
  'sparse_lm/train/__main__.py',
  'sparse_lm/report/__main__.py',
)
NEVER = ('tensorflow', 'configs', 'experiments', 'tests')


def folder_of(path):
  """'core', 'methods.weight', ... for a path below sparse_lm; '' for its top-level modules."""
  parts = pathlib.PurePosixPath(path).with_suffix('').parts[1:]
  depth = 2 if parts[0] == 'methods' else 1
  return '.'.join(parts[:depth]) if len(parts) > depth else ''


def imported(source, path):
  """Dotted names of every module that a source may import, relative and nested imports included."""
  package = pathlib.PurePosixPath(path).parent.parts
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else ()
      module = '.'.join((*base, *filter(None, [node.module])))
      # `from sparse_lm.core import tree` imports sparse_lm.core.tree.
      yield from (f'{module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
      yield ast.unparse(node.args[0]).removeprefix('f').strip('\'"')


def allowed(here):
  """The rooms that a room may import from."""
  room = here.split('.')[0]
  below = ROOMS[: ROOMS.index(room)]
  own = (room,) if room != 'methods' else ()
  return {*own, *below} - set(NOT.get(room, ()))


def import_faults(source, path):
  """What the imports of a source at `path` break, one line each."""
  here = folder_of(path)
  for name in imported(source, path):
    if name.split('.')[0] in NEVER and path.startswith('sparse_lm'):
      yield f'{path} imports {name}'
    if not name.startswith('sparse_lm.') or not path.startswith('sparse_lm') or path in ENTRIES:
      continue
    target = folder_of(f'{name.replace(".", "/")}/x').split('.')[0]
    target = '' if f'sparse_lm/{target}.py' in MODULES else target
    if target not in allowed(here):
      yield f'{path} imports {name}: {here or "a top-level module"} may import {sorted(allowed(here))}'


@pytest.mark.parametrize('path', MODULES)
def test_imports_run_one_way(path):
  source = (ROOT / path).read_text(encoding='utf-8')
  assert not list(import_faults(source, path))


def test_every_room_is_in_the_list():
  found = {folder_of(path).split('.')[0] for path in MODULES if path.startswith('sparse_lm/')}
  assert found == set(ROOMS)
