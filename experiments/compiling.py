"""Programs that are compiled all at the same time, when the first of them is asked for."""

import concurrent.futures
import os
from collections.abc import Callable, Hashable

from jax.stages import Compiled, Lowered


class Together:
  """Lowered programs by name; programs of equal text share an executable.

  An error in tracing or compiling a program is raised when that program is asked for.
  """

  def __init__(self) -> None:
    self._lowered: dict[Hashable, Lowered] = {}
    self._done: dict[Hashable, Compiled | Exception] = {}
    self._known: set[Hashable] = set()

  def __contains__(self, name: Hashable) -> bool:
    """Whether a program was traced, or failed to be."""
    return name in self._known

  def lower(self, name: Hashable, make: Callable[[], Lowered]) -> None:
    """Traces a program, unless it was traced before."""
    if name in self._known:
      return
    self._known.add(name)
    try:
      self._lowered[name] = make()
    except Exception as error:  # an error of any kind concerns this program alone
      self._done[name] = error

  def take(self, name: Hashable) -> Compiled:
    """The executable, which can be taken once: it is not kept here any longer.

    Raises what the program met instead, whenever it is asked for.
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
