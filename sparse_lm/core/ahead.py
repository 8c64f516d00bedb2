"""Functions that are compiled before they are called, several at the same time."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import jax
from jax.stages import Compiled, Traced

from sparse_lm.core.tree import Tree

Function = Callable[..., Tree]


class Ahead:
  """A jitted function and its executables."""

  def __init__(
    self,
    function: Function,
    donate: tuple[int, ...] = (),
    options: dict[str, str | bool] | None = None,
  ) -> None:
    """A function that nothing is compiled of yet.

    Args:
      donate: numbers of the arguments whose buffers the call takes over.
      options: of the compiler.
    """
    self._jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
    self._compiled: dict[Hashable, Compiled] = {}

  def compiled(self, *arguments: Tree) -> Compiled:
    """The executable for arguments of these shapes: arrays or shape structs."""
    compile_together([Call(self, arguments)])
    return self._compiled[_key(arguments)]

  def traced(self, *arguments: Tree) -> Traced:
    """The function traced with arguments of these shapes, which says what it returns."""
    return self._jitted.trace(*arguments)

  def __call__(self, *arguments: Tree) -> Tree:
    """Calls the executable for the arguments."""
    return self.compiled(*arguments)(*arguments)


class Call(NamedTuple):
  """A function and shapes of arguments that it will be called with."""

  function: Ahead
  arguments: tuple[Tree, ...]


def compile_together(calls: Iterable[Call]) -> None:
  """Compiles what these calls lack, in as many threads as there are cores.

  Functions are traced one after the other, because tracing holds Python's lock.
  """
  new: dict[tuple[Ahead, Hashable], concurrent.futures.Future[Compiled]] = {}
  with _threads() as pool:
    for function, arguments in calls:
      key = _key(arguments)
      if key not in function._compiled and (function, key) not in new:
        new[function, key] = pool.submit(function.traced(*arguments).lower().compile)
    for (function, key), future in new.items():
      function._compiled[key] = future.result()


def _threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def _key(arguments: tuple[Tree, ...]) -> Hashable:
  leaves, structure = jax.tree.flatten(arguments)
  return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
