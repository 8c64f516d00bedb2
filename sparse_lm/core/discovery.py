"""Finds implementations by name: each file of a package such as `sparse_lm.patterns` is one of them.

There is no registry to edit. A file defines exactly one public class; the names of helper classes begin
with an underscore. The implementation has the file's name. If that name is reserved by Python, the file's
name ends with an underscore, which is not part of the implementation's name (`global_.py` is `global`).
"""

import importlib
import inspect
import pkgutil

from sparse_lm.core.errors import UserError, unknown


def names(package: str) -> list[str]:
  """Returns the names of all implementations in a package, such as 'sparse_lm.patterns'."""
  return sorted(_modules(package))


def _modules(package: str) -> dict[str, str]:
  """Returns a dict from the name of each implementation in a package to its module's name."""
  folder = importlib.import_module(package).__path__
  found = (module.name for module in pkgutil.iter_modules(folder) if not module.ispkg)
  return {module.rstrip('_'): module for module in found}


def name_of(implementation: type) -> str:
  """Returns the name by which `load` finds a class."""
  return implementation.__module__.rpartition('.')[2].rstrip('_')


def load(package: str, name: str, field: str) -> type:
  """Returns the public class of the implementation `name` in a package.

  Args:
    package: such as 'sparse_lm.patterns'.
    name: name of the implementation.
    field: config field that holds the name, for the error message.

  Raises:
    UserError: there is no such implementation, or its class lacks an abstract method of its base class.
    TypeError: the file does not define exactly one public class.
  """
  modules = _modules(package)
  if name not in modules:
    raise unknown(field, name, modules)
  module = importlib.import_module(f'{package}.{modules[name]}')
  public = [
    value
    for value in vars(module).values()
    if inspect.isclass(value)
    and value.__module__ == module.__name__
    and not value.__name__.startswith('_')
  ]
  if len(public) != 1:
    raise TypeError(f'{module.__name__} must define one public class, not {len(public)}')
  if inspect.isabstract(public[0]):
    missing = ', '.join(sorted(public[0].__abstractmethods__))
    raise UserError(
      f'{module.__name__}.{public[0].__name__} does not define {missing}, which its base class requires; '
      'valid: a definition with exactly this name'
    )
  return public[0]
