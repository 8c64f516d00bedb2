"""Measuring the time of a training step, without compilation, evaluation and saving."""

import time

import jax

from sparse_lm.core.tree import Tree

_compilations = 0  # of this process: traces, lowerings and compilations of any function


def _count(event: str, *_: float, **__: str) -> None:
  global _compilations
  if event.startswith('/jax/core/compile'):
    _compilations += 1


jax.monitoring.register_event_duration_secs_listener(_count)


class StepTimer:
  """Measures spans of steps without waiting for the device after each of them.

  Steps run asynchronously: a span's time is that of its steps only where the device has finished its
  work at both ends. The caller sees to that before `start` and `stop`.
  """

  def __init__(self) -> None:
    self._seconds, self._steps = 0.0, 0  # of the spans since the last `take`
    self.start()

  def start(self) -> None:
    """Begins a span. The device is idle."""
    self._begun, self._running, self._compiled = time.perf_counter(), 0, _compilations

  def step(self, outputs: Tree) -> None:
    """Counts the step that was just dispatched.

    Where it had to be compiled, this call waits for its `outputs`, and the span begins anew: the steps
    before it that were still running cannot be told from the compilation.
    """
    if _compilations != self._compiled:
      jax.block_until_ready(outputs)
      self.start()
    else:
      self._running += 1

  def stop(self) -> None:
    """Ends the span. The device has finished its steps."""
    if self._running:
      self._seconds += time.perf_counter() - self._begun
      self._steps += self._running
    self._running = 0

  def take(self) -> float | None:
    """Seconds per step in the spans since the last call; `None` where all steps had to be compiled."""
    seconds = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return seconds
