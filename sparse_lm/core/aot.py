"""Ahead-of-time (AOT) compilation of functions, several of them in parallel."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import jax
from jax.stages import Compiled, Lowered

from sparse_lm.core.tree import Tree

Function = Callable[..., Tree]


class AotFunction:
  """A jitted function that keeps one compiled executable for each combination of argument shapes."""

  def __init__(
    self,
    function: Function,
    donate: tuple[int, ...] = (),
    options: dict[str, int] | None = None,
    device: jax.Device | None = None,
  ) -> None:
    """Wraps the function without compiling it.

    Args:
      donate: indices of the arguments whose buffers are donated, as `donate_argnums` of `jax.jit`.
      options: compiler options.
      device: the device that the function runs on if its arguments are NumPy arrays; `None` means
        JAX's default device.
    """
    self._device = device
    self._jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
    self._compiled: dict[Hashable, Compiled] = {}

  def compiled(self, *arguments: Tree) -> Compiled:
    """Returns the executable for arguments of these shapes; compiles it if necessary.

    Args:
      arguments: arrays or shape structs.
    """
    key = _key(arguments)
    if key not in self._compiled:
      compile_together([Call(self, arguments)])
    return self._compiled[key]

  def outputs(self, *arguments: Tree) -> Tree:
    """Returns shape structs of the function's outputs for arguments of these shapes."""
    with jax.default_device(self._device):
      return self._jitted.trace(*arguments).out_info

  def lower(self, *arguments: Tree) -> Lowered:
    """Traces and lowers the function for arguments of these shapes."""
    with jax.default_device(self._device):
      return self._jitted.lower(*arguments)

  def __call__(self, *arguments: Tree) -> Tree:
    """Calls the executable that matches the arguments' shapes."""
    return self.compiled(*arguments)(*arguments)


class Call(NamedTuple):
  """A function with the arguments of a later call; shape structs may stand for arrays."""

  function: AotFunction
  arguments: tuple[Tree, ...]


def compile_together(calls: Iterable[Call]) -> None:
  """Compiles all executables that these calls still need, in parallel, with one thread per core.

  Tracing stays sequential because it holds Python's global interpreter lock.
  """
  new: dict[tuple[AotFunction, Hashable], concurrent.futures.Future[Compiled]] = {}
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
