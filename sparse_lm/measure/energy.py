"""Energy, where a meter exists: NVML on a GPU, RAPL on a CPU that lets it be read."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax

RAPL = pathlib.Path('/sys/class/powercap/intel-rapl:0')


@dataclasses.dataclass
class Measured:
  """What a meter read: joules of the whole device while it was on, `None` without a meter."""

  joules: float | None = None


@contextlib.contextmanager
def meter() -> Iterator[Measured]:
  """Measures what runs inside; `joules` is there afterwards. What else the device did counts too."""
  measured = Measured()
  read = _nvml() if jax.default_backend() == 'gpu' else _rapl(RAPL)
  before = read() if read else None
  try:
    yield measured
  finally:
    if read:
      measured.joules = read() - before


def per_token(joules: float | None, tokens: int) -> str:
  """'1.234 J/token', or 'not measured'."""
  return 'not measured' if joules is None or not tokens else f'{joules / tokens:.3g} J/token'


def _nvml() -> Callable[[], float] | None:
  """Joules since the driver was loaded, if the NVML bindings are installed."""
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
  """Joules on a counter that is made to run on where it wraps around, if it may be read."""
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
