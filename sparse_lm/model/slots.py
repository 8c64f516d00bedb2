"""Slots: a folder under `methods/` is a slot, a file in it a method, and a config names it.

There is no registry. A layer slot's method is a subclass of `layers.method.LayerMethod`, a weight method
one of `weights.method.WeightMethod`. A field of it with a default is a config key, and a number states
its range there (`ranges.ranged`); a field without one is supplied by whoever builds the method.

In the config of a layer slot
  name, layers   the method, and a Python slice (`'1::2'`) of the layers that run it
  inner          the method that runs inside one that wraps another, as gates and top-k do
  fallback       the method of the layers that no slice names
  order, rules   several methods instead of one: `order=('early', 'late')` names the groups
                 `rules.early` and `rules.late`, each with a name, layers, and an inner of its own; a
                 layer runs the first whose slice holds it
The dense twin, which costs are compared with, follows from what the methods declare. The slot `stack`
holds what runs the layers, and `site` what acts on activations that modules name: one method each,
without layers of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from sparse_lm.core import discovery
from sparse_lm.core.errors import UserError
from sparse_lm.core.ranges import FieldValue, layer_slice
from sparse_lm.layers.method import LayerMethod, Traits
from sparse_lm.layers.spec import Spec

LAYER_SLOTS = ('activation', 'attention', 'mlp', 'depth')
SLOTS = ('weight', *LAYER_SLOTS, 'stack', 'site')
# The keys of a slot's config, and of one of its rules, besides its method's own fields.
SHARED = {
  'weight': ('name', 'sparsity', 'distribution', 'dense', 'order', 'rules'),
  'stack': ('name',),
  'site': ('name',),
  **dict.fromkeys(LAYER_SLOTS, ('name', 'layers', 'inner', 'fallback', 'order', 'rules')),
}
OF_RULE = {
  'weight': ('name', 'sparsity', 'distribution', 'match'),
  **dict.fromkeys(LAYER_SLOTS, ('name', 'layers', 'inner')),
}
_RESERVED = {key for keys in (*SHARED.values(), *OF_RULE.values()) for key in keys}


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


def defaults(slot: str, name: str, field: str = '') -> dict[str, FieldValue]:
  """The config keys of a method and their defaults; `field` as in `method`."""
  return {
    field.name: field.default
    for field in dataclasses.fields(method(slot, name, field))
    if field.default is not dataclasses.MISSING
    and field.name not in ('parent', 'name')
    and 'supplied' not in field.metadata
  }


def wraps(slot: str, name: str) -> bool:
  """Whether a method runs another one inside."""
  return 'inner' in {field.name for field in dataclasses.fields(method(slot, name))}


def groups(slot: str, config: ConfigDict) -> Iterator[tuple[str, ConfigDict]]:
  """The groups of `config` that name a method of the slot, by dotted name."""
  own = config[slot]
  rules = [(f'{slot}.rules.{name}', own.rules[name]) for name in own.get('rules', {})]
  yield from [(slot, own), *rules]
  if slot in LAYER_SLOTS:
    yield f'{slot}.fallback', own.fallback
    for group, node in [(slot, own), *rules]:
      yield f'{group}.inner', node.inner


def fields(config: ConfigDict) -> dict[str, FieldValue]:
  """The part of a group that belongs to the method that it names."""
  return {key: value for key, value in config.items() if key not in _RESERVED}


# What the model gives a method beside its config: the `Spec`, a name, and how to make the methods inside.
Supplied = dict[str, Spec | str | Callable[..., LayerMethod] | None]


@dataclasses.dataclass(frozen=True)
class MethodConfig:
  """A method of a layer slot with its fields, hashable.

  Attributes:
    slot: one of `LAYER_SLOTS`, 'stack' or 'site'.
    name: the method.
    fields: its config keys and values.
    inner: what runs inside of it, `None` of a method that wraps none.
    group: the config's group that it was read from, for messages.
  """

  slot: str
  name: str
  fields: tuple[tuple[str, FieldValue], ...] = ()
  inner: 'MethodConfig | None' = None
  group: str = dataclasses.field(default='', compare=False)

  @classmethod
  def from_config(cls, slot: str, group: str, config: ConfigDict) -> 'MethodConfig':
    """Reads a group. Raises UserError for an inner method that wraps another one in turn."""
    inner = None
    if wraps(slot, config.name):
      if 'inner' not in config:  # a fallback, or an inner method itself
        raise UserError(
          f'config.{group}.name={config.name!r} wraps another method and has none to wrap; valid: '
          f'config.{slot}.name={config.name!r}'
        )
      inner = cls.from_config(slot, f'{group}.inner', config.inner)
    own_fields = tuple(sorted(fields(config).items()))
    return cls(slot, config.name, own_fields, inner, f'config.{group}')

  @property
  def cls(self) -> type[LayerMethod]:
    """The method's class."""
    return method(self.slot, self.name)

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

  def dense(self, spec: Spec) -> 'MethodConfig':
    """What the dense twin runs: a dense method itself, a dense inner one, or the twin it declares."""
    twin = self.traits(spec).twin
    if not twin:
      return self
    if self.inner and not self.inner.traits(spec).twin:
      return self.inner
    return MethodConfig(self.slot, twin, tuple(sorted(defaults(self.slot, twin).items())))

  def make(self, supplied: Supplied) -> LayerMethod:
    """The method itself, with those of `supplied` that it has as fields; `inner` makes its inner one."""
    if self.inner:
      supplied = supplied | {
        'inner': functools.partial(self.inner.make, supplied | {'name': 'inner'})
      }
    wanted = {field.name for field in dataclasses.fields(self.cls)}
    return self.cls(**dict(self.fields), **{k: v for k, v in supplied.items() if k in wanted})

  def check(self, spec: Spec) -> None:
    """Raises UserError where the method's fields do not fit each other or the model."""
    try:
      self.module(spec).check()
    except UserError as error:
      # A method names its fields as those of its slot: it cannot know which group they stand in.
      raise UserError(str(error).replace(f'config.{self.slot}.', f'{self.group}.')) from None


@dataclasses.dataclass(frozen=True)
class SlotConfig:
  """Which method of a slot runs in which layers, hashable.

  Attributes:
    slot: one of `LAYER_SLOTS`.
    rules: Python slices of layers, and the method of each; a layer runs the first that holds it.
    fallback: the method of the layers that no slice holds.
  """

  slot: str
  rules: tuple[tuple[str, MethodConfig], ...]
  fallback: MethodConfig

  @classmethod
  def from_config(cls, slot: str, config: ConfigDict) -> 'SlotConfig':
    """Reads `config.<slot>`: its rules in their order, or its own method as the only rule."""
    rules = {f'{slot}.rules.{name}': config.rules[name] for name in config.order} or {slot: config}
    return cls(
      slot,
      tuple((rule.layers, MethodConfig.from_config(slot, g, rule)) for g, rule in rules.items()),
      MethodConfig.from_config(slot, f'{slot}.fallback', config.fallback),
    )

  def at(self, layer: int, count: int) -> MethodConfig:
    """The method of a layer of `count`."""
    return self.by_layer(count)[layer]

  def by_layer(self, count: int) -> list[MethodConfig]:
    """The method of each layer. Raises UserError for a slice that holds no layer that is left for it."""
    found: dict[int, MethodConfig] = {}
    for text, own in self.rules:
      chosen = layer_slice(f'{own.group}.layers', text, count)
      left = [layer for layer in chosen if layer not in found]
      if not left:
        raise UserError(
          f'{own.group}.layers={text!r}: rules before it in config.{self.slot}.order hold all of its '
          f'layers, {_listed(chosen)}; valid: layers that are left, or an earlier place'
        )
      found |= dict.fromkeys(left, own)
    return [found.get(layer, self.fallback) for layer in range(count)]

  def running(self, count: int) -> list[MethodConfig]:
    """The methods that run in any of `count` layers, each followed by what it wraps."""
    found = dict.fromkeys(self.by_layer(count))
    return [part for own in found for part in (own, own.inner) if part is not None]

  def dense(self, spec: Spec) -> 'SlotConfig':
    """What the dense twin runs in each layer."""
    rules = tuple((layers, own.dense(spec)) for layers, own in self.rules)
    return SlotConfig(self.slot, rules, self.fallback.dense(spec))

  def notes(self, count: int) -> list[str]:
    """Sentences on layers that several rules name, and on those that none does; none of a single rule."""
    if len(self.rules) < 2:
      return []
    taken, found = set(), []
    for text, own in self.rules:
      chosen = layer_slice(f'{own.group}.layers', text, count)
      if lost := [layer for layer in chosen if layer in taken]:
        found.append(f'{own.group}: rules before it hold layers {_listed(lost)}')
      taken.update(chosen)
    if left := [layer for layer in range(count) if layer not in taken]:
      name = self.fallback.name
      found.append(f'config.{self.slot}: no rule names layers {_listed(left)}, which run {name!r}')
    return found


def _listed(layers: list[int]) -> str:
  return ', '.join(map(str, layers))
