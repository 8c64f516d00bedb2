"""Signals: statistics of gradients or inputs that weight methods read. Each signal is one file.

A file defines one subclass of `core.signal.TrainingSignal`, which is computed from training steps, or of
`core.signal.CalibrationSignal`, which is computed from calibration text.
"""

import functools

from sparse_lm.core import discovery
from sparse_lm.core.signal import CalibrationSignal, Signal, TrainingSignal


@functools.cache
def signal(name: str) -> Signal:
  """Returns the signal of that name. Raises UserError, which lists all names, if there is none."""
  return discovery.load(__name__, name, 'signal')()


def from_training(needs: tuple[str, ...]) -> dict[str, TrainingSignal]:
  """Returns the named signals that come from training steps, by name."""
  found = {name: signal(name) for name in needs}
  return {name: one for name, one in found.items() if isinstance(one, TrainingSignal)}


def from_calibration(needs: tuple[str, ...]) -> dict[str, CalibrationSignal]:
  """Returns the named signals that come from calibration text, by name."""
  found = {name: signal(name) for name in needs}
  return {name: one for name, one in found.items() if isinstance(one, CalibrationSignal)}
