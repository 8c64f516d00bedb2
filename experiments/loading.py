"""Finds and imports studies: those of this package by name, others by the path of their file."""

import ast
import importlib
import importlib.util
import os
import pathlib
import pkgutil
import sys
import types
from collections.abc import Callable

import experiments
from experiments.sweep import Run
from sparse_lm.core.errors import UserError, located, unknown


def questions() -> dict[str, str]:
  """The first line of each study's docstring, by the study's name. Imports no study."""
  found = {}
  for module in pkgutil.iter_modules(experiments.__path__):
    source = importlib.util.find_spec(f'experiments.{module.name}').origin
    tree = ast.parse(pathlib.Path(source).read_text(encoding='utf-8'))
    if any(_defines_runs(node) for node in tree.body):
      found[module.name] = (ast.get_docstring(tree) or '').partition('\n')[0]
  return found


def _defines_runs(node: ast.stmt) -> bool:
  """True for `def runs` and for an assignment such as `runs, report = STUDY.runs, STUDY.report`."""
  if isinstance(node, ast.FunctionDef):
    return node.name == 'runs'
  targets = node.targets if isinstance(node, ast.Assign) else []
  return any(
    isinstance(name, ast.Name) and name.id == 'runs'
    for target in targets
    for name in ast.walk(target)
  )


def is_path(study: str) -> bool:
  """Returns whether `study` is a path. Names of studies have neither a slash nor a suffix."""
  return study.endswith('.py') or '/' in study or os.sep in study


def shortened(study: str) -> str:
  """Converts the path of a study's file in this package to the study's name; returns others unchanged."""
  file = pathlib.Path(study).expanduser().absolute()
  own = is_path(study) and file.parent in map(pathlib.Path, experiments.__path__)
  return file.stem if own and file.stem in questions() else study


def load(study: str) -> tuple[types.ModuleType, list[Run]]:
  """Imports a study. Returns its module and the runs that it plans.

  Args:
    study: a name of this package, such as 'patterns', or the path of a Python file.

  Raises:
    UserError: there is no such study, its file fails, or it lacks `runs` or `report`.
  """
  if is_path(study):
    module = _load_file(study)
    runs = _attempt(study, _function(study, module, 'runs'))
  else:
    names = questions()
    if study not in names:
      raise UserError(f"{unknown('study', study, names)}; or the path of a study's file")
    module = importlib.import_module(f'experiments.{study}')
    runs = module.runs()
  _function(study, module, 'report')
  if not isinstance(runs, list) or not all(isinstance(run, Run) for run in runs) or not runs:
    raise UserError(
      f'study {study}: runs() returns {_short(runs)}; valid: a list of Run, not empty'
    )
  return module, runs


def _load_file(path: str) -> types.ModuleType:
  """Executes a study's file. Modules beside the file can be imported from it."""
  file = pathlib.Path(path).expanduser().absolute()
  if file.suffix != '.py' or not file.is_file():
    near = [str(pathlib.Path(path).parent / other.name) for other in file.parent.glob('*.py')]
    raise unknown('study file', path, near or ['the path of a Python file'])
  if file.stem in questions():
    raise UserError(
      f'study file {path}: {file.stem!r} is the name of a study of this package, whose results have '
      'the same folder; valid: another file name'
    )
  if str(file.parent) not in sys.path:
    sys.path.append(str(file.parent))
  spec = importlib.util.spec_from_file_location(f'study_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their own module up
  _attempt(path, lambda: spec.loader.exec_module(module))
  return module


def _attempt(path: str, call: Callable[[], list[Run] | None]) -> list[Run] | None:
  """Calls code of a study's file. Its errors become a UserError that names the line of the file."""
  try:
    return call()
  except UserError as error:
    raise UserError(f'study {path}: {error}') from error
  except Exception as error:
    file = pathlib.Path(path).expanduser().absolute()
    raise UserError(f'study {path} {located(error, str(file))}') from error


def _function(study: str, module: types.ModuleType, name: str) -> Callable:
  found = vars(module).get(name)
  if not callable(found):
    raise UserError(
      f'study {study} defines no function {name}; valid: both runs() -> list[Run] and '
      'report(lines, folder) -> str'
    )
  return found


def _short(value: object) -> str:
  if isinstance(value, list):
    other = [item for item in value if not isinstance(item, Run)]
    return f'a list that holds {type(other[0]).__name__}' if other else 'an empty list'
  return f'a value of type {type(value).__name__}'
