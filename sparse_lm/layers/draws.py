"""Keys of random draws, which depend on the path of the module that draws.

In a scan, one module stands for the modules of several layers and has the path of one of them. In each
pass its draws are, to the bit, those that the module of that pass's layer makes where layers run
unscanned.
"""

import contextlib
import contextvars
import dataclasses
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import LazyRng

from sparse_lm.core.paths import Place

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Pass:
  """A pass of a scan whose modules stand for those of several layers.

  Attributes:
    layers: for each layer whose modules are traced, the layer that it stands for in each pass.
    index: the number of this pass, int32.
    rngs: the model's random streams, by name.
    path: the model's path.
  """

  layers: Mapping[int, tuple[int, ...]]
  index: jax.Array
  rngs: Mapping[str, LazyRng]
  path: tuple[str, ...]

  def key(self, stream: str, path: Path) -> jax.Array:
    """The key of one draw. `path` is that of the module below the model, then the number of the draw."""
    rng = self.rngs[stream]
    return jax.random.fold_in(rng.rng, self._number(_hashed, rng.suffix, path))

  def fixed_key(self, path: Path) -> jax.Array:
    """The key that depends on nothing but the path of a module below the model."""
    return jax.random.key(self._number(_checksum, self.path, path))

  def _number(self, of: Callable[[Path], int], above: Path, path: Path) -> jax.Array:
    """`of(path)` for the path of the layer that this pass stands for, uint32."""
    place, below = Place(path), path[1:]
    layers = self.layers[place.layer]
    numbers = [of((*above, place.part.of(layer), *below)) for layer in layers]
    return jnp.asarray(np.array(numbers, np.uint32))[self.index]


_pass: contextvars.ContextVar[Pass | None] = contextvars.ContextVar('pass', default=None)


@contextlib.contextmanager
def standing_for(own: Pass) -> Iterator[None]:
  """Within this context, modules draw as those of the layers that `own` says they stand for."""
  token = _pass.set(own)
  try:
    yield
  finally:
    _pass.reset(token)


class Drawing(nn.Module):
  """A module whose draws are the same whether its layer is scanned or not.

  Other modules draw differently in a scan than outside of it, but still differently in every layer.
  """

  @nn.nowrap
  def make_rng(self, name: str = 'params') -> jax.Array:
    """The key of the next draw from a stream; see `flax.linen.Module.make_rng`."""
    key, own = super().make_rng(name), _pass.get()
    if own is None or not self.has_rng(name):
      return key
    return own.key(name, (*self.path, self.scope.rng_counters[name]))


class Dropout(Drawing, nn.Dropout):
  """Flax's dropout, whose draws are the same whether its layer is scanned or not."""


def fixed_key(module: nn.Module) -> jax.Array:
  """A key that depends on the module's path alone: the same in every call, another one in each layer."""
  own = _pass.get()
  return jax.random.key(_checksum(module.path)) if own is None else own.fixed_key(module.path)


def _checksum(path: Path) -> int:
  return zlib.crc32('/'.join(path).encode())


def _hashed(path: Path) -> int:
  """The number that Flax folds into a stream's key for a path, see `flax.core.scope.LazyRng`."""
  digest = hashlib.sha1()
  for part in path:
    if flax.config.flax_fix_rng_separator:
      digest.update(b'\00')
    is_name = isinstance(part, str)
    digest.update(part.encode() if is_name else part.to_bytes((part.bit_length() + 7) // 8, 'big'))
  return int.from_bytes(digest.digest()[:4], 'big')
