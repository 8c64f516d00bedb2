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
  """Measures spans of steps without waiting for the device after each step.

  Steps run asynchronously, so a span contains only the time of its steps if the device is idle at both
  ends. The caller must wait for the device before `start` and `stop`.
  """

  def __init__(self) -> None:
    self._seconds, self._steps = 0.0, 0  # of the spans since the last `take`
    self.start()

  def start(self) -> None:
    """Begins a span. The device must be idle."""
    self._begun, self._running, self._compiled = time.perf_counter(), 0, _compilations

  def step(self, outputs: Tree) -> None:
    """Counts the step that was just dispatched.

    If the step had to be compiled, this call waits for its `outputs` and begins a new span. The time of
    the earlier steps of the span is lost, because they may have run during the compilation.
    """
    if _compilations != self._compiled:
      jax.block_until_ready(outputs)
      self.start()
    else:
      self._running += 1

  def stop(self) -> None:
    """Ends the span. The device must have finished its steps."""
    if self._running:
      self._seconds += time.perf_counter() - self._begun
      self._steps += self._running
    self._running = 0

  def take(self) -> float | None:
    """Returns the seconds per step since the last call, `None` if all steps had to be compiled."""
    seconds = self._seconds / self._steps if self._steps else None
    self._seconds, self._steps = 0.0, 0
    return seconds
