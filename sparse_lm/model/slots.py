"""Slots and their methods: each folder under `methods/` is a slot, and each file in it is a method.

There is no registry; a config names the method. Methods of layer slots derive from
`layers.method.LayerMethod`, and weight methods derive from `weights.method.WeightMethod`. A field with a
default is a config key, and the default of a number is given with its range (`ranges.ranged`). Fields
without a default are set by the model.

The config of a layer slot has these keys:

- `name`, `layers`: the method, and the layers that run it as a Python slice such as `'1::2'`.
- `inner`: the inner method, if the method wraps another one (as gates and top-k do).
- `fallback`: the method of all other layers.
- `order`, `rules`: several methods instead of one. `order=('early', 'late')` names the groups
  `rules.early` and `rules.late`, each with its own name, layers and inner. A layer runs the first rule
  whose slice contains it.

The dense twin, with which costs are compared, follows from the methods' traits. The slot `stack` holds
the method that runs the layers, and the slot `site` holds the method that changes activations at sites.
Each has one method for the whole model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from flax.errors import NameInUseError
from ml_collections import ConfigDict

from sparse_lm.core import discovery
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import FieldValue, layer_slice
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec

LAYER_SLOTS = ('activation', 'attention', 'mlp', 'depth')
SLOTS = ('weight', *LAYER_SLOTS, 'stack', 'site')
# The keys of a slot's config, and of a rule's, besides the fields of its method.
SLOT_KEYS = {
  'weight': ('name', 'sparsity', 'distribution', 'dense', 'order', 'rules'),
  'stack': ('name',),
  'site': ('name',),
  **dict.fromkeys(LAYER_SLOTS, ('name', 'layers', 'inner', 'fallback', 'order', 'rules')),
}
RULE_KEYS = {
  'weight': ('name', 'sparsity', 'distribution', 'match'),
  **dict.fromkeys(LAYER_SLOTS, ('name', 'layers', 'inner')),
}
_RESERVED = {key for keys in (*SLOT_KEYS.values(), *RULE_KEYS.values()) for key in keys}


def names(slot: str) -> list[str]:
  """Returns the names of the methods of a slot."""
  return discovery.names(f'sparse_lm.methods.{slot}')


def method(slot: str, name: str, field: str = '') -> type:
  """Returns the class in `methods/<slot>/<name>.py`.

  Raises:
    UserError: there is no such method, or its class is not a `LayerMethod`. The message names the config
      field `field`.
  """
  found = discovery.load(f'sparse_lm.methods.{slot}', name, field or f'config.{slot}.name')
  if slot != 'weight' and not issubclass(found, LayerMethod):
    raise UserError(
      f'{found.__module__}.{found.__name__} is not a LayerMethod; valid: a class derived from '
      'sparse_lm.layers.method.LayerMethod'
    )
  return found


def defaults(slot: str, name: str, field: str = '') -> dict[str, FieldValue]:
  """Returns the config keys of a method with their defaults; `field` is as in `method`."""
  return {
    field.name: field.default
    for field in dataclasses.fields(method(slot, name, field))
    if field.default is not dataclasses.MISSING
    and field.name not in ('parent', 'name')
    and 'supplied' not in field.metadata
  }


def wraps(slot: str, name: str) -> bool:
  """Returns whether a method wraps another one."""
  return 'inner' in {field.name for field in dataclasses.fields(method(slot, name))}


def groups(slot: str, config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """Yields the dotted name and the group for each group of `config` that names a method of the slot."""
  own = config[slot]
  rules = [(f'{slot}.rules.{name}', own.rules[name]) for name in own.get('rules', {})]
  yield from [(slot, own), *rules]
  if slot in LAYER_SLOTS:
    yield f'{slot}.fallback', own.fallback
    for group, node in [(slot, own), *rules]:
      yield f'{group}.inner', node.inner


def fields(config: ConfigDict) -> dict[str, FieldValue]:
  """Returns the keys of a group that are fields of its method."""
  return {key: value for key, value in config.items() if key not in _RESERVED}


# Fields that the model sets: the `Spec`, a module name, and constructors of the methods inside.
Supplied = dict[str, Spec | str | Callable[..., LayerMethod] | None]


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """The config of one method of a layer slot; hashable.

  Attributes:
    slot: one of `LAYER_SLOTS`, 'stack' or 'site'.
    name: name of the method.
    fields: its config keys and values.
    inner: the config of the inner method; `None` if the method wraps none.
    group: the config group that it was read from, for messages.
  """

  slot: str
  name: str
  fields: tuple[tuple[str, FieldValue], ...] = ()
  inner: 'MethodConfig | None' = None
  group: str = dataclasses.field(default='', compare=False)

  @classmethod
  def from_config(cls, slot: str, group: str, config: ConfigDict) -> 'MethodConfig':
    """Reads a config group. Raises a UserError if an inner method wraps another method."""
    inner = None
    if wraps(slot, config.name):
      if 'inner' not in config:  # a fallback, or an inner method itself
        raise UserError(
          f'config.{group}.name={config.name!r} wraps another method, but there is no inner one here; '
          f'valid: config.{slot}.name={config.name!r}'
        )
      inner = cls.from_config(slot, f'{group}.inner', config.inner)
    own_fields = tuple(sorted(fields(config).items()))
    return cls(slot, config.name, own_fields, inner, f'config.{group}')

  @property
  def cls(self) -> type[LayerMethod]:
    """The method's class."""
    return method(self.slot, self.name)

  def module(self, spec: Spec) -> LayerMethod:
    """Returns the method as an unbound module, from which traits can be read."""
    return self.make({'spec': spec, 'activation': None, 'inner': None, 'parent': None})

  def traits(self, spec: Spec) -> Traits:
    """Returns the method's traits in a model of these dimensions; wrong traits raise a UserError."""
    try:
      return self.module(spec).traits
    except TypeError as error:
      raise UserError(
        f'{self.cls.__module__}.{self.cls.__name__} has wrong traits ({error}); '
        f'valid: {", ".join(field.name for field in dataclasses.fields(Traits))}'
      ) from None

  def dense(self, spec: Spec) -> 'MethodConfig':
    """Returns the dense twin's method: this or the inner method if dense, else the declared twin."""
    twin = self.traits(spec).twin
    if not twin:
      return self
    if self.inner and not self.inner.traits(spec).twin:
      return self.inner
    return MethodConfig(self.slot, twin, tuple(sorted(defaults(self.slot, twin).items())))

  def make(self, supplied: Supplied) -> LayerMethod:
    """Constructs the method; `supplied` sets its other fields, and unknown names are ignored."""
    if self.inner:
      supplied = supplied | {
        'inner': functools.partial(self.inner.make, supplied | {'name': 'inner'})
      }
    wanted = {field.name for field in dataclasses.fields(self.cls)}
    try:
      return self.cls(**dict(self.fields), **{k: v for k, v in supplied.items() if k in wanted})
    except NameInUseError as error:
      name = supplied['name']
      raise UserError(
        f'{str(error).partition(": ")[0]}, because it has one already; valid: one call of '
        f'self.{name}(), whose result is kept: {name} = self.{name}()'
      ) from error

  def check(self, spec: Spec) -> None:
    """Raises a UserError if the method's fields do not fit each other or the model."""
    try:
      self.module(spec).check()
    except UserError as error:
      # A method's message names the slot's fields, because the method does not know its config group.
      raise UserError(str(error).replace(f'config.{self.slot}.', f'{self.group}.')) from None


@dataclasses.dataclass(frozen=True)
class SlotConfig:
  """The config of a layer slot: which method runs in which layers; hashable.

  Attributes:
    slot: one of `LAYER_SLOTS`.
    rules: pairs of a Python slice of layers and a method. A layer runs the first rule that contains it.
    fallback: the method of all other layers.
  """

  slot: str
  rules: tuple[tuple[str, MethodConfig], ...]
  fallback: MethodConfig

  @classmethod
  def from_config(cls, slot: str, config: ConfigDict) -> 'SlotConfig':
    """Reads `config.<slot>`: its rules in order, or its method as the only rule."""
    rules = {f'{slot}.rules.{name}': config.rules[name] for name in config.order} or {slot: config}
    return cls(
      slot,
      tuple((rule.layers, MethodConfig.from_config(slot, g, rule)) for g, rule in rules.items()),
      MethodConfig.from_config(slot, f'{slot}.fallback', config.fallback),
    )

  def at(self, layer: int, count: int) -> MethodConfig:
    """Returns the method of one layer, given the number of layers."""
    return self.by_layer(count)[layer]

  def by_layer(self, count: int) -> list[MethodConfig]:
    """Returns the method of each layer. Raises a UserError if a rule applies to no layer."""
    found: dict[int, MethodConfig] = {}
    for text, own in self.rules:
      chosen = layer_slice(f'{own.group}.layers', text, count)
      left = [layer for layer in chosen if layer not in found]
      if not left:
        raise UserError(
          f'{own.group}.layers={text!r}: earlier rules in config.{self.slot}.order already cover its '
          f'layers {_listed(chosen)}; valid: other layers, or an earlier place in the order'
        )
      found |= dict.fromkeys(left, own)
    return [found.get(layer, self.fallback) for layer in range(count)]

  def running(self, count: int) -> list[MethodConfig]:
    """Returns the methods that run in any of `count` layers, each followed by its inner method."""
    found = dict.fromkeys(self.by_layer(count))
    return [part for own in found for part in (own, own.inner) if part is not None]

  def dense(self, spec: Spec) -> 'SlotConfig':
    """Returns the slot's config in the dense twin."""
    rules = tuple((layers, own.dense(spec)) for layers, own in self.rules)
    return SlotConfig(self.slot, rules, self.fallback.dense(spec))

  def notes(self, count: int) -> list[str]:
    """Returns notes on layers that several rules or no rule name; empty if there is only one rule."""
    if len(self.rules) < 2:
      return []
    taken, found = set(), []
    for text, own in self.rules:
      chosen = layer_slice(f'{own.group}.layers', text, count)
      if lost := [layer for layer in chosen if layer in taken]:
        found.append(f'{own.group}: earlier rules already cover layers {_listed(lost)}')
      taken.update(chosen)
    if left := [layer for layer in range(count) if layer not in taken]:
      name = self.fallback.name
      found.append(f'config.{self.slot}: no rule names layers {_listed(left)}, which run {name!r}')
    return found


def _listed(layers: list[int]) -> str:
  return ', '.join(map(str, layers))
