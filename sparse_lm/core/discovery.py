"""Implementations that are found by name: a folder is a kind of thing, each file in it one of that kind.

There is no registry to edit. A file defines one public class (helpers begin with an underscore), and its
name is the file's, less an underscore at the end, which a file has whose name Python reserves.
"""

import importlib
import inspect
import pkgutil

from sparse_lm.core.errors import UserError, unknown


def names(package: str) -> list[str]:
  """The names of all implementations in a package, such as 'sparse_lm.patterns'."""
  return sorted(_modules(package))


def _modules(package: str) -> dict[str, str]:
  """The module of each implementation in a package, by the implementation's name."""
  folder = importlib.import_module(package).__path__
  found = (module.name for module in pkgutil.iter_modules(folder) if not module.ispkg)
  return {module.rstrip('_'): module for module in found}


def name_of(implementation: type) -> str:
  """The name by which `load` finds a class."""
  return implementation.__module__.rpartition('.')[2].rstrip('_')


def load(package: str, name: str, field: str) -> type:
  """The one public class of the file `name` in a package.

  Raises:
    UserError: there is no such file, which is said of the config's `field`, or the class leaves out what
      its base class asks for.
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
    raise TypeError(f'{module.__name__} is to define one public class, not {len(public)}')
  if inspect.isabstract(public[0]):
    missing = ', '.join(sorted(public[0].__abstractmethods__))
    raise UserError(
      f'{module.__name__}.{public[0].__name__} does not define {missing}, which its base class asks for; '
      'valid: a name spelt as it is there'
    )
  return public[0]
