"""Slots: a folder under `methods/` is a slot, a file in it a method, and a config names it.

There is no registry. A layer slot's method is a subclass of `layers.method.LayerMethod`, a weight method
one of `weights.method.WeightMethod`. A field of it with a default is a config key, and a number states
its range there (`ranges.ranged`); a field without one is supplied by whoever builds the method.
"""

import dataclasses
import functools
from typing import Any

from sparse_lm.core import discovery
from sparse_lm.core.errors import UserError
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec

SLOTS = ('weight', 'activation', 'attention', 'mlp', 'depth')
# The keys of a slot's config besides its method's own.
_LAYER_KEYS = ('name', 'layers', 'otherwise')
SHARED = dict.fromkeys(SLOTS, _LAYER_KEYS) | {
  'weight': ('name', 'sparsity', 'distribution', 'dense')
}


def names(slot: str) -> list[str]:
  """The methods of a slot: the modules in its folder."""
  return discovery.names(f'sparse_lm.methods.{slot}')


def method(slot: str, name: str, field: str = '') -> type:
  """The class in `methods/<slot>/<name>.py`. Raises UserError, naming the config's `field`."""
  found = discovery.load(f'sparse_lm.methods.{slot}', name, field or f'config.{slot}.name')
  if slot != 'weight' and not issubclass(found, LayerMethod):
    raise UserError(
      f'{found.__module__}.{found.__name__} is no LayerMethod; valid: a class derived from '
      'sparse_lm.layers.method.LayerMethod, which says what it declares'
    )
  return found


def defaults(slot: str, name: str, field: str = '') -> dict[str, Any]:
  """The config keys of a method and their defaults; `field` as in `method`."""
  return {
    field.name: field.default
    for field in dataclasses.fields(method(slot, name, field))
    if field.default is not dataclasses.MISSING
    and field.name not in ('parent', 'name')
    and 'supplied' not in field.metadata
  }


def groups(slot: str, config: Any) -> dict[str, Any]:
  """The groups of `config` that name a method of the slot, by dotted name."""
  own = config[slot]
  found = {slot: own}
  if 'otherwise' in own:
    found[f'{slot}.otherwise'] = own.otherwise
  return found


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
    otherwise: the choice of the other layers, which is also what a method that wraps another
      wraps, and what the dense twin runs; `None` of a choice that is one itself.
  """

  slot: str
  name: str
  fields: tuple[tuple[str, Any], ...] = ()
  layers: str = ':'
  otherwise: 'Choice | None' = None

  @classmethod
  def from_config(cls, slot: str, config: Any) -> 'Choice':
    """Reads `config.<slot>`. Raises UserError where `otherwise` would wrap another method in turn."""
    rest = config.otherwise
    otherwise = cls(slot, rest.name, tuple(sorted(fields(slot, rest).items())))
    if otherwise.wraps:
      raise UserError(
        f'config.{slot}.otherwise.name={rest.name!r} wraps another method and has none to wrap; '
        f'valid: config.{slot}.name={rest.name!r}'
      )
    return cls(
      slot, config.name, tuple(sorted(fields(slot, config).items())), config.layers, otherwise
    )

  @property
  def cls(self) -> type:
    """The method's class."""
    return method(self.slot, self.name)

  @property
  def group(self) -> str:
    """The config's group that it was read from."""
    return f'config.{self.slot}' if self.otherwise else f'config.{self.slot}.otherwise'

  @property
  def wraps(self) -> bool:
    """Whether the method runs another inside."""
    return 'inner' in {field.name for field in dataclasses.fields(self.cls)}

  def running(self, count: int) -> 'list[Choice]':
    """The choices whose methods run in any of `count` layers: this one, the other, or both."""
    chosen = len(self.chosen_layers(count))
    own = [self] if chosen else []
    return own + ([self.otherwise] if chosen < count or self.wraps else [])

  def at(self, layer: int, count: int) -> 'list[Choice]':
    """The choices whose methods run in a layer: this one and what it wraps, or the other."""
    if not self.chosen(layer, count):
      return [self.otherwise]
    return [self, self.otherwise] if self.wraps else [self]

  def module(self, spec: Spec) -> LayerMethod:
    """The method by itself, to be asked what it declares."""
    return self.make({'spec': spec, 'activation': None, 'inner': None, 'parent': None})

  def traits(self, spec: Spec) -> Traits:
    """What the method declares in a model of these dimensions. Raises UserError for a malformed one."""
    try:
      return self.module(spec).traits
    except TypeError as error:
      raise UserError(
        f'{self.cls.__module__}.{self.cls.__name__} does not declare its traits as it should ({error}); '
        f'valid: {", ".join(field.name for field in dataclasses.fields(Traits))}'
      ) from None

  def dense(self, spec: Spec) -> 'Choice':
    """What the dense twin runs: `otherwise` if that is dense, else the method's declared twin."""
    twin = self.traits(spec).twin
    if not twin:
      return self
    if self.otherwise and not self.otherwise.traits(spec).twin:
      return self.otherwise
    own = tuple(sorted(defaults(self.slot, twin).items()))
    return dataclasses.replace(self, name=twin, fields=own, layers=':')

  def chosen(self, layer: int, count: int) -> bool:
    """Whether `layer` of `count` is among `layers`."""
    return layer in self.chosen_layers(count)

  def chosen_layers(self, count: int) -> range:
    """The layers named by `layers`. Raises UserError where there are none."""
    return _layers(self.slot, self.layers, count)

  def build(self, layer: int, count: int, **supplied: Any) -> Any:
    """The method for one layer.

    `supplied` fills the fields without a default that the method declares; `inner`, where it
    declares that, is a maker of the `otherwise` method.
    """
    if self.otherwise is None:
      return self.make(supplied)
    if not self.chosen(layer, count):
      return self.otherwise.make(supplied)
    inner = functools.partial(self.otherwise.make, supplied | {'name': 'inner'})
    return self.make(supplied | {'inner': inner})

  def make(self, supplied: dict[str, Any]) -> Any:
    """The method itself; of `supplied` it takes the fields that it has."""
    wanted = {field.name for field in dataclasses.fields(self.cls)}
    return self.cls(**dict(self.fields), **{k: v for k, v in supplied.items() if k in wanted})


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
