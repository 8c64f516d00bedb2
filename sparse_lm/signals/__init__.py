"""Signals: what weight methods may read besides the weights. One file each, found by name.

A file defines one subclass of `core.signal.TrainingSignal` or of `core.signal.CalibrationSignal`, and
that base class says where the signal comes from.
"""

import functools

from sparse_lm.core import discovery
from sparse_lm.core.signal import CalibrationSignal, Signal, TrainingSignal


@functools.cache
def signal(name: str) -> Signal:
  """The signal of that name. Raises UserError, with the names there are, where there is none."""
  return discovery.load(__name__, name, 'signal')()


def from_training(needs: tuple[str, ...]) -> dict[str, TrainingSignal]:
  """Those of the named signals that come from training steps, by name."""
  found = {name: signal(name) for name in needs}
  return {name: one for name, one in found.items() if isinstance(one, TrainingSignal)}


def from_calibration(needs: tuple[str, ...]) -> dict[str, CalibrationSignal]:
  """Those of the named signals that come from calibration text, by name."""
  found = {name: signal(name) for name in needs}
  return {name: one for name, one in found.items() if isinstance(one, CalibrationSignal)}
