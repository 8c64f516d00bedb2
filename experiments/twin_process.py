"""The PyTorch twin of the dense step, `experiments.torch_twin`, in a process of its own."""

import contextlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from sparse_lm.core.records import JsonObject

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The process that starts another may hold most of a GPU's memory, so the other takes what it needs and no
# more.
BESIDE = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


class NoTwin(Exception):
  """Why the PyTorch twin cannot be measured."""


class Twin:
  """The twin's process. A call runs a window of its training steps and waits for them."""

  def __init__(self, sizes: Mapping[str, int], steps: int, errors: pathlib.Path) -> None:
    self.steps, self.errors, self.peak_memory = steps, errors, None
    command = [sys.executable, '-m', 'experiments.torch_twin']
    with errors.open('w') as file:
      self.process = subprocess.Popen(
        [*command, *(f'--{name}={size}' for name, size in sizes.items())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        text=True,
        cwd=ROOT,
      )

  def read(self) -> JsonObject:
    """The next line that it prints. Raises NoTwin where the process has ended."""
    line = self.process.stdout.readline()
    if not line:
      said_last = self.errors.read_text().strip().splitlines()[-1:]
      raise NoTwin(f'experiments.torch_twin ended: {" ".join(said_last)}')
    return json.loads(line)

  def __call__(self) -> float:
    """Runs a window of steps, and returns the seconds that it took."""
    self.process.stdin.write(f'{self.steps}\n')
    self.process.stdin.flush()
    found = self.read()
    self.peak_memory = found['peak_memory']
    return found['seconds']


@contextlib.contextmanager
def running(sizes: Mapping[str, int], steps: int) -> Iterator[Twin]:
  """Runs the twin, which compiles while the caller goes on. Raises NoTwin without PyTorch."""
  if importlib.util.find_spec('torch') is None:
    raise NoTwin('PyTorch is not installed')
  with tempfile.TemporaryDirectory() as folder:
    twin = Twin(sizes, steps, pathlib.Path(folder) / 'errors')
    try:
      yield twin
    finally:
      twin.process.kill()
      twin.process.wait()
