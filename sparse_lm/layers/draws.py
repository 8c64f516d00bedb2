"""Random numbers that do not depend on whether layers are scanned.

Flax derives a module's random key from its path. In a scan over layers, one traced module represents the
modules of several layers but has only one path. The classes below give it, in each iteration, exactly the
random numbers that the layer's own module would draw without the scan.
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
  """One iteration of a scan over layers, in which a traced layer represents several layers.

  Attributes:
    layers: for each traced layer, the layer that it represents in each iteration.
    index: number of this iteration, int32.
    rngs: the model's random streams by name.
    path: the model's path.
  """

  layers: Mapping[int, tuple[int, ...]]
  index: jax.Array
  rngs: Mapping[str, LazyRng]
  path: tuple[str, ...]

  def key(self, stream: str, path: Path) -> jax.Array:
    """Returns the key of one draw; `path` is the module's path in the model plus the draw's number."""
    rng = self.rngs[stream]
    return jax.random.fold_in(rng.rng, self._number(_hashed, rng.suffix, path))

  def fixed_key(self, path: Path) -> jax.Array:
    """Returns a key that depends only on the module's path in the model."""
    return jax.random.key(self._number(_checksum, self.path, path))

  def _number(self, of: Callable[[Path], int], above: Path, path: Path) -> jax.Array:
    """Returns `of(path)`, uint32, with the traced layer replaced by the layer that it represents."""
    place, below = Place(path), path[1:]
    layers = self.layers[place.layer]
    numbers = [of((*above, place.part.of(layer), *below)) for layer in layers]
    return jnp.asarray(np.array(numbers, np.uint32))[self.index]


_pass: contextvars.ContextVar[Pass | None] = contextvars.ContextVar('pass', default=None)


@contextlib.contextmanager
def representing_layers(own: Pass) -> Iterator[None]:
  """In this context, modules draw the random numbers of the layers that they represent in `own`."""
  token = _pass.set(own)
  try:
    yield
  finally:
    _pass.reset(token)


class RandomModule(nn.Module):
  """A module that draws the same random numbers whether its layer is scanned or not.

  Other modules draw other numbers if they are scanned. The numbers still differ between layers.
  """

  @nn.nowrap
  def make_rng(self, name: str = 'params') -> jax.Array:
    """Returns the key of the next draw from a stream, as `flax.linen.Module.make_rng` does."""
    key, own = super().make_rng(name), _pass.get()
    if own is None or not self.has_rng(name):
      return key
    return own.key(name, (*self.path, self.scope.rng_counters[name]))


class Dropout(RandomModule, nn.Dropout):
  """Flax's dropout with the same random numbers whether its layer is scanned or not."""


def fixed_key(module: nn.Module) -> jax.Array:
  """Returns a key that depends only on the module's path: equal in all calls, different in each layer."""
  own = _pass.get()
  return jax.random.key(_checksum(module.path)) if own is None else own.fixed_key(module.path)


def _checksum(path: Path) -> int:
  return zlib.crc32('/'.join(path).encode())


def _hashed(path: Path) -> int:
  """Returns the number that Flax folds into a stream's key for a path (`flax.core.scope.LazyRng`)."""
  digest = hashlib.sha1()
  for part in path:
    if flax.config.flax_fix_rng_separator:
      digest.update(b'\00')
    is_name = isinstance(part, str)
    digest.update(part.encode() if is_name else part.to_bytes((part.bit_length() + 7) // 8, 'big'))
  return int.from_bytes(digest.digest()[:4], 'big')
