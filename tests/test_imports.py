"""Reads every module's imports and comparisons, and holds them to the layout."""

import ast
import dataclasses
import pathlib

import pytest

from sparse_lm.core import slots

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYER_SLOTS = tuple(f'methods.{slot}' for slot in slots.SLOTS if slot != 'weight')
MODULES = sorted(
  str(path.relative_to(ROOT))
  for folder in ('sparse_lm', 'experiments')
  for path in (ROOT / folder).rglob('*.py')
)

# What the files of a folder may import from the package, besides their own folder.
ALLOWED = {
  'core': (),
  'data': ('core',),
  'methods.weight': ('core',),
  'layers': ('core',),
  **dict.fromkeys(LAYER_SLOTS, ('core', 'layers')),
  'model': ('core', 'layers'),
  'train': ('core', 'data', 'layers', 'model'),
  'inference': ('core', 'data', 'layers', 'model', 'train'),
  'evals': ('core', 'data', 'layers', 'model', 'train', 'inference'),
  'report': ('core', 'data', 'layers', 'model', 'train', 'inference', 'evals'),
  # Entry points at the top of the package.
  '': ('core', 'data', 'layers', 'model', 'train', 'inference', 'evals', 'report'),
}
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


def import_faults(source, path):
  """What the imports of a source at `path` break, one line each."""
  here = folder_of(path)
  for name in imported(source, path):
    if name.split('.')[0] in NEVER and path.startswith('sparse_lm'):
      yield f'{path} imports {name}'
    if not name.startswith('sparse_lm.') or not path.startswith('sparse_lm'):
      continue
    target = folder_of(f'{name.replace(".", "/")}/x')
    if path == 'sparse_lm/core/slots.py' and target.startswith('methods'):
      continue  # the one door to the methods
    own = target == here and not here.startswith('methods')
    if not own and not any(target == ok or target.startswith(f'{ok}.') for ok in ALLOWED[here]):
      yield f'{path} imports {name}: {here or "a top-level module"} may import {ALLOWED[here]}'


def comparison_faults(source, path):
  """Comparisons with a method's name outside its own file.

  A method's field may have a choice of the same spelling ('none' of `rescale`), so the name of what
  is compared tells the two apart.
  """
  methods = {(slot, name) for slot in slots.SLOTS for name in slots.names(slot)}
  fields = {f.name for slot, name in methods for f in dataclasses.fields(slots.method(slot, name))}
  fields -= {'name', 'parent'}
  names = {name for slot, name in methods if path != f'sparse_lm/methods/{slot}/{name}.py'}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Compare):
      sides = [node.left, *node.comparators]
    elif isinstance(node, ast.match_case):
      sides = [node.pattern]
    else:
      continue
    identifiers = {ast.unparse(side).split('.')[-1] for side in sides}
    literals = {
      constant.value
      for side in sides
      for constant in ast.walk(side)
      if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
    if literals & names and not identifiers & fields:
      yield f'{path}:{sides[0].lineno} compares with a method: {sorted(literals & names)}'


@pytest.mark.parametrize('path', MODULES)
def test_imports_run_one_way(path):
  source = (ROOT / path).read_text(encoding='utf-8')
  assert not list(import_faults(source, path))


@pytest.mark.parametrize('path', [path for path in MODULES if path.startswith('sparse_lm')])
def test_no_method_is_known_by_name_outside_its_file(path):
  source = (ROOT / path).read_text(encoding='utf-8')
  assert not list(comparison_faults(source, path))


def test_every_folder_of_the_package_is_in_the_table():
  # A folder that the table forgets would raise a KeyError above only once it imports something.
  assert {folder_of(path) for path in MODULES if path.startswith('sparse_lm/')} <= {
    *ALLOWED,
    'methods',
  }


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('sparse_lm/core/x.py', 'from sparse_lm.layers import linear'),
    ('sparse_lm/core/x.py', 'def f():\n  import sparse_lm.model.lm'),
    ('sparse_lm/core/x.py', 'from ..train import loop'),
    ('sparse_lm/core/x.py', 'import sparse_lm.methods.weight.rigl'),
    ('sparse_lm/data/x.py', 'from sparse_lm.layers.spec import Spec'),
    ('sparse_lm/methods/weight/x.py', 'from sparse_lm.methods.weight.rigl import RigL'),
    ('sparse_lm/methods/weight/x.py', 'from . import rigl'),
    ('sparse_lm/methods/weight/x.py', 'from sparse_lm.layers import linear'),
    ('sparse_lm/methods/mlp/x.py', 'from sparse_lm.methods.mlp import dense'),
    ('sparse_lm/methods/mlp/x.py', 'from sparse_lm.model import block'),
    ('sparse_lm/train/x.py', 'from sparse_lm.methods.weight.rigl import RigL'),
    ('sparse_lm/train/x.py', "importlib.import_module(f'sparse_lm.methods.weight.{name}')"),
    ('sparse_lm/model/x.py', 'from sparse_lm.methods import mlp'),
    ('sparse_lm/train/x.py', 'from sparse_lm.inference import load'),
    ('sparse_lm/train/x.py', 'import tensorflow as tf'),
    ('sparse_lm/train/x.py', 'from configs import base'),
    ('sparse_lm/report/x.py', 'from experiments import run'),
  ],
)
def test_an_offending_import_is_caught(path, source):
  assert list(import_faults(source, path))


@pytest.mark.parametrize(
  'source',
  [
    "if config.weight.name == 'rigl': pass",
    "x = 1 if method in ('set', 'rigl') else 2",
    "if 'magnitude' != config.weight['name']: pass",
    "match name:\n  case 'ste':\n    pass",
  ],
)
def test_a_method_compared_by_name_is_caught(source):
  assert list(comparison_faults(source, 'sparse_lm/train/x.py'))


def test_what_is_allowed_is_not_caught():
  allowed = (
    'from sparse_lm.core import tree\nfrom sparse_lm.layers.linear import Linear\nimport jax'
  )
  assert not list(import_faults(allowed, 'sparse_lm/methods/mlp/x.py'))
  assert not list(comparison_faults("rescale != 'none'", 'sparse_lm/core/x.py'))
  assert not list(comparison_faults("name == 'rigl'", 'sparse_lm/methods/weight/rigl.py'))
