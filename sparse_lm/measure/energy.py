"""Energy meters: NVML for NVIDIA GPUs, RAPL for CPUs if it is readable."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax

RAPL = pathlib.Path('/sys/class/powercap/intel-rapl:0')


@dataclasses.dataclass
class Measured:
  """The result of a meter: joules of the whole device, or `None` without a meter."""

  joules: float | None = None


@contextlib.contextmanager
def meter() -> Iterator[Measured]:
  """Measures the device's energy in this context; `joules` is set at its end.

  Other work of the device in this time is included.
  """
  measured = Measured()
  read = _nvml() if jax.default_backend() == 'gpu' else _rapl(RAPL)
  before = read() if read else None
  try:
    yield measured
  finally:
    if read:
      measured.joules = read() - before


def per_token(joules: float | None, tokens: int) -> str:
  """Returns the energy per token as text, such as '1.23 J/token', or 'not measured'."""
  return 'not measured' if joules is None or not tokens else f'{joules / tokens:.3g} J/token'


def _nvml() -> Callable[[], float] | None:
  """Returns a function that reads joules since the driver was loaded; `None` without NVML."""
  try:
    import pynvml
  except ImportError:
    return None
  try:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
  except pynvml.NVMLError:
    return None
  return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _rapl(folder: pathlib.Path) -> Callable[[], float] | None:
  """Returns a function that reads joules from RAPL's counter, across overflows; `None` if unreadable."""
  try:
    wraps = int((folder / 'max_energy_range_uj').read_text())
    last = int((folder / 'energy_uj').read_text())
  except (OSError, ValueError):
    return None
  total = 0

  def read() -> float:
    nonlocal last, total
    now = int((folder / 'energy_uj').read_text())
    total, last = total + (now - last) % wraps, now
    return total / 1e6

  return read
