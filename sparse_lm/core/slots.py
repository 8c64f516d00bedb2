"""Slots: a folder under `methods/` is a slot, a file in it a method, and a config names it.

There is no registry. `methods/<slot>/<name>.py` defines one public class. A field of it with a
default is a config key; a field without one is supplied by whoever builds the method.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from typing import Any

from sparse_lm.core.errors import UserError, unknown

SLOTS = ('weight', 'activation', 'attention', 'mlp', 'depth')
# The keys of a slot's config besides its method's own.
_LAYER_KEYS = ('name', 'layers', 'otherwise')
SHARED = dict.fromkeys(SLOTS, _LAYER_KEYS) | {'weight': ('name', 'sparsity', 'budget', 'dense')}


def names(slot: str) -> list[str]:
  """The methods of a slot: the modules in its folder."""
  package = importlib.import_module(f'sparse_lm.methods.{slot}')
  return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def method(slot: str, name: str) -> type:
  """The class in `methods/<slot>/<name>.py`. Raises UserError with the nearest name."""
  if name not in names(slot):
    raise unknown(f'config.{slot}.name', name, names(slot))
  module = importlib.import_module(f'sparse_lm.methods.{slot}.{name}')
  public = [
    value
    for value in vars(module).values()
    if inspect.isclass(value)
    and value.__module__ == module.__name__
    and not value.__name__.startswith('_')
  ]
  if len(public) != 1:
    raise TypeError(f'{module.__name__} is to define one public class, not {len(public)}')
  return public[0]


def defaults(slot: str, name: str) -> dict[str, Any]:
  """The config keys of a method and their defaults."""
  return {
    field.name: field.default
    for field in dataclasses.fields(method(slot, name))
    if field.default is not dataclasses.MISSING and field.name not in ('parent', 'name')
  }


def fields(slot: str, config: Any) -> dict[str, Any]:
  """The part of `config.<slot>` that belongs to its method."""
  return {key: value for key, value in config.items() if key not in SHARED[slot]}


@dataclasses.dataclass(frozen=True)
class Choice:
  """A layer slot's part of a config, hashable: which method runs in which layers.

  Attributes:
    slot: one of `SLOTS`.
    name: the method.
    fields: its config keys and values.
    layers: a Python slice (`'1::2'`) of the layers that get it.
    otherwise: the method of the other layers, with its own defaults.
  """

  slot: str
  name: str
  fields: tuple[tuple[str, Any], ...]
  layers: str = ':'
  otherwise: str = ''

  @classmethod
  def from_config(cls, slot: str, config: Any) -> 'Choice':
    """Reads `config.<slot>`. Raises UserError for an unknown `otherwise`."""
    if config.otherwise not in names(slot):
      raise unknown(f'config.{slot}.otherwise', config.otherwise, names(slot))
    own = tuple(sorted(fields(slot, config).items()))
    return cls(slot, config.name, own, config.layers, config.otherwise)

  def chosen(self, layer: int, count: int) -> bool:
    """Whether `layer` of `count` is among `layers`."""
    return layer in self.chosen_layers(count)

  def chosen_layers(self, count: int) -> range:
    """The layers named by `layers`. Raises UserError where there are none."""
    return _layers(self.slot, self.layers, count)

  def build(self, layer: int, count: int, **supplied: Any) -> Any:
    """The method for one layer; `supplied` fills the fields without a default that it declares."""
    if self.chosen(layer, count):
      name, fields = self.name, dict(self.fields)
    else:
      name, fields = self.otherwise, {}
    cls = method(self.slot, name)
    wanted = {field.name for field in dataclasses.fields(cls)}
    return cls(**fields, **{k: v for k, v in supplied.items() if k in wanted})


@functools.lru_cache
def _layers(slot: str, text: str, count: int) -> range:
  try:
    parts = [int(part) if part.strip() else None for part in text.split(':')]
    if len(parts) not in (2, 3):
      raise ValueError
    chosen = range(count)[slice(*parts)]
  except ValueError:
    raise UserError(f"config.{slot}.layers={text!r} is not a slice such as ':' or '1::2'") from None
  if not chosen:
    raise UserError(f'config.{slot}.layers={text!r} matches none of the {count} layers')
  return chosen
