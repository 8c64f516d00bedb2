"""Where modules and parameters are in a model: the one file that knows how they are named.

Trees give every leaf a path, `'block_0/mlp/up/kernel'`. Code that needs to know which layer that is, what
it is a part of, or which bias belongs to a kernel, reads the path as a `Place` and asks that.
"""

import dataclasses
import enum
import re

KERNEL, BIAS = 'kernel', 'bias'


class Part(enum.StrEnum):
  """The parts of a layer. A part's name begins with the value here and ends with the number of the layer.

  Attributes:
    BLOCK: attention and the MLP, whose sum is added to the residual stream.
    DEPTH: what decides which tokens enter the block.
    RESIDUAL: the residual stream as the layer reads it; one more follows the last layer.
    REMOVED: in packed variables, the mark of a layer that was removed.
  """

  BLOCK = 'block_'
  DEPTH = 'depth_'
  RESIDUAL = 'residual_'
  REMOVED = 'removed_layer_'

  def of(self, layer: int) -> str:
    """The name of this part of a layer, below the model."""
    return f'{self}{layer}'


_PARTS = re.compile(rf'({"|".join(Part)})(\d+)')


@dataclasses.dataclass(frozen=True)
class Place:
  """A module, a parameter, or an activation of a model.

  Attributes:
    names: from the root of the model down to it; the root has none.
  """

  names: tuple[str, ...]

  @classmethod
  def parse(cls, path: str) -> 'Place':
    """The place at a path whose names are separated by slashes."""
    return cls(tuple(filter(None, path.split('/'))))

  def __str__(self) -> str:
    return '/'.join(self.names)

  def __truediv__(self, name: str) -> 'Place':
    """The submodule, parameter or activation `name` of this module; `name` may be a path."""
    return Place((*self.names, *Place.parse(name).names))

  @property
  def name(self) -> str:
    """Its own name in the module that it belongs to."""
    return self.names[-1]

  @property
  def module(self) -> 'Place':
    """The module that it belongs to."""
    return Place(self.names[:-1])

  @property
  def layer(self) -> int | None:
    """The layer's number, from 0; `None` outside of the layers."""
    return self._in_layer[1] if self._in_layer else None

  @property
  def part(self) -> Part | None:
    """The part of the layer that this place belongs to; `None` outside of the layers."""
    return self._in_layer[0] if self._in_layer else None

  @property
  def _in_layer(self) -> tuple[Part, int] | None:
    found = _PARTS.fullmatch(self.names[0]) if self.names else None
    return (Part(found[1]), int(found[2])) if found else None

  def within(self, module: 'Place') -> bool:
    """Whether this is `module` itself or lies inside of it, at any depth."""
    return self.names[: len(module.names)] == module.names

  @property
  def is_bias(self) -> bool:
    """Whether it is the bias of a linear layer, or of a stack of them."""
    return self.name == BIAS or self.name.endswith(f'_{BIAS}')

  @property
  def bias(self) -> 'Place':
    """The bias that belongs to a kernel: beside 'kernel' it is 'bias', beside a stack 'up', 'up_bias'."""
    return self.module / (BIAS if self.name == KERNEL else f'{self.name}_{BIAS}')

  @property
  def in_any_layer(self) -> 'Place':
    """The same place with a star for the number of its layer: 'block_*/mlp/up'."""
    return self if self.part is None else Place((f'{self.part}*', *self.names[1:]))
