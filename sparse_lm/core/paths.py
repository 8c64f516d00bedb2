"""Paths of modules and parameters. Only this file knows how paths are formed.

Every leaf of a tree has a path, such as `'block_0/mlp/up/kernel'`. Code that needs the layer's number,
the part of the layer, or the bias of a kernel parses the path into a `Place` and reads its properties.
"""

import dataclasses
import enum
import re

KERNEL, BIAS = 'kernel', 'bias'


class Part(enum.StrEnum):
  """The parts of a layer. A part's name is the value below, followed by the layer's number.

  Attributes:
    BLOCK: attention and the MLP, which add their outputs to the residual stream.
    DEPTH: the depth method, which decides which tokens enter the block.
    RESIDUAL: the residual stream before the layer. The one with the highest number follows the last
      layer.
    REMOVED: in packed variables, marks a layer that was removed.
  """

  BLOCK = 'block_'
  DEPTH = 'depth_'
  RESIDUAL = 'residual_'
  REMOVED = 'removed_layer_'

  def of(self, layer: int) -> str:
    """Returns the name of this part of a layer, as a submodule of the model."""
    return f'{self}{layer}'


_PARTS = re.compile(rf'({"|".join(Part)})(\d+)')


@dataclasses.dataclass(frozen=True)
class Place:
  """The path of a module, a parameter or an activation in a model.

  Attributes:
    names: the path's names, from the model down; empty for the model itself.
  """

  names: tuple[str, ...]

  @classmethod
  def parse(cls, path: str) -> 'Place':
    """Parses a path whose names are separated by slashes."""
    return cls(tuple(filter(None, path.split('/'))))

  def __str__(self) -> str:
    return '/'.join(self.names)

  def __truediv__(self, name: str) -> 'Place':
    """Returns the place `name` inside this module; `name` may be a path."""
    return Place((*self.names, *Place.parse(name).names))

  @property
  def name(self) -> str:
    """Last name of the path."""
    return self.names[-1]

  @property
  def module(self) -> 'Place':
    """The module that contains this place."""
    return Place(self.names[:-1])

  @property
  def layer(self) -> int | None:
    """Number of the layer, from 0; `None` outside the layers."""
    return self._in_layer[1] if self._in_layer else None

  @property
  def part(self) -> Part | None:
    """The part of the layer that contains this place; `None` outside the layers."""
    return self._in_layer[0] if self._in_layer else None

  @property
  def _in_layer(self) -> tuple[Part, int] | None:
    found = _PARTS.fullmatch(self.names[0]) if self.names else None
    return (Part(found[1]), int(found[2])) if found else None

  def within(self, module: 'Place') -> bool:
    """Returns whether this place is `module` itself or lies inside it, at any depth."""
    return self.names[: len(module.names)] == module.names

  @property
  def is_bias(self) -> bool:
    """Whether this is the bias of a linear layer, or of stacked linear layers."""
    return self.name == BIAS or self.name.endswith(f'_{BIAS}')

  @property
  def bias(self) -> 'Place':
    """The bias that belongs to this kernel: 'bias' for 'kernel', 'up_bias' for stacked kernels 'up'."""
    return self.module / (BIAS if self.name == KERNEL else f'{self.name}_{BIAS}')

  @property
  def in_any_layer(self) -> 'Place':
    """This place with `*` instead of the layer's number, such as 'block_*/mlp/up'."""
    return self if self.part is None else Place((f'{self.part}*', *self.names[1:]))
