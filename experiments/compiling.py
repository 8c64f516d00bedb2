"""Compiles several programs at the same time, when the first of them is needed."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable

from jax.stages import Compiled, Lowered


class Together:
  """Lowered programs by name. Programs with equal text share one executable.

  An error in tracing or compiling a program is raised when that program is taken.
  """

  def __init__(self) -> None:
    self._lowered: dict[Hashable, Lowered] = {}
    self._done: dict[Hashable, Compiled | Exception] = {}
    self._known: set[Hashable] = set()

  def __contains__(self, name: Hashable) -> bool:
    """True if a program was traced, or if tracing it failed."""
    return name in self._known

  def lower(self, name: Hashable, make: Callable[[], Lowered]) -> None:
    """Traces a program unless it was traced before."""
    if name in self._known:
      return
    self._known.add(name)
    try:
      self._lowered[name] = make()
    except Exception as error:  # whatever the error, the other programs are still compiled
      self._done[name] = error

  def take(self, name: Hashable) -> Compiled:
    """Returns the executable of a program and forgets it, so it can be taken once.

    Raises the error of a program that could not be traced or compiled, each time.
    """
    if name not in self._done:
      self._compile()
    found = self._done[name]
    if isinstance(found, Exception):
      raise found
    del self._done[name]
    return found

  def _compile(self) -> None:
    """Compiles all lowered programs, in one thread for each core."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      by_text: dict[Hashable, concurrent.futures.Future[Compiled]] = {}
      futures = {}
      for name, lowered in self._lowered.items():
        key = lowered.as_text(), lowered.in_tree, lowered.out_tree
        if key not in by_text:
          by_text[key] = pool.submit(lowered.compile)
        futures[name] = by_text[key]
    self._lowered = {}
    for name, future in futures.items():
      self._done[name] = future.exception() or future.result()
