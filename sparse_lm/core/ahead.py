"""Functions that are compiled before they are called, several at the same time."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import jax
from jax.stages import Compiled, Lowered

from sparse_lm.core.tree import Tree

Function = Callable[..., Tree]


class Ahead:
  """A jitted function with the executables that have been compiled for it, by shapes of arguments."""

  def __init__(
    self,
    function: Function,
    donate: tuple[int, ...] = (),
    options: dict[str, int] | None = None,
    device: jax.Device | None = None,
  ) -> None:
    """Wraps the function; nothing is compiled yet.

    Args:
      donate: indices of the arguments whose buffers are donated, as `donate_argnums` of `jax.jit`.
      options: compiler options.
      device: the device that the function runs on when its arguments are NumPy arrays; `None` = JAX's
        default device.
    """
    self._device = device
    self._jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
    self._compiled: dict[Hashable, Compiled] = {}

  def compiled(self, *arguments: Tree) -> Compiled:
    """The executable for arguments of these shapes: arrays or shape structs."""
    key = _key(arguments)
    if key not in self._compiled:
      compile_together([Call(self, arguments)])
    return self._compiled[key]

  def outputs(self, *arguments: Tree) -> Tree:
    """Shape structs of what the function returns for arguments of these shapes."""
    with jax.default_device(self._device):
      return self._jitted.trace(*arguments).out_info

  def lower(self, *arguments: Tree) -> Lowered:
    """The function traced and lowered for arguments of these shapes."""
    with jax.default_device(self._device):
      return self._jitted.lower(*arguments)

  def __call__(self, *arguments: Tree) -> Tree:
    """Calls the executable for the arguments."""
    return self.compiled(*arguments)(*arguments)


class Call(NamedTuple):
  """A function and the arguments, or their shape structs, that it will be called with."""

  function: Ahead
  arguments: tuple[Tree, ...]


def compile_together(calls: Iterable[Call]) -> None:
  """Compiles the executables that these calls need and do not have, in one thread for each core.

  Functions are traced one after the other, because tracing holds Python's global interpreter lock.
  """
  new: dict[tuple[Ahead, Hashable], concurrent.futures.Future[Compiled]] = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for function, arguments in calls:
      key = _key(arguments)
      if key not in function._compiled and (function, key) not in new:
        new[function, key] = pool.submit(function.lower(*arguments).compile)
    for (function, key), future in new.items():
      function._compiled[key] = future.result()


def _key(arguments: tuple[Tree, ...]) -> Hashable:
  leaves, structure = jax.tree.flatten(arguments)
  return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
