"""Runs the PyTorch twin of the dense step, `experiments.torch_twin`, in a process of its own."""

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
# The parent process may hold most of a GPU's memory, so a child process allocates only what it needs.
BESIDE = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


class NoTwin(Exception):
  """The PyTorch twin cannot be measured; the message says why."""


class Twin:
  """The process of the twin. A call runs a window of training steps and waits for its end."""

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
    """Reads the next line that the process prints. Raises NoTwin if the process has ended."""
    line = self.process.stdout.readline()
    if not line:
      said_last = self.errors.read_text().strip().splitlines()[-1:]
      raise NoTwin(f'experiments.torch_twin ended: {" ".join(said_last)}')
    return json.loads(line)

  def __call__(self) -> float:
    """Runs a window of steps and returns its seconds."""
    self.process.stdin.write(f'{self.steps}\n')
    self.process.stdin.flush()
    found = self.read()
    self.peak_memory = found['peak_memory']
    return found['seconds']


@contextlib.contextmanager
def running(sizes: Mapping[str, int], steps: int) -> Iterator[Twin]:
  """Starts the twin, which compiles in the background. Raises NoTwin if PyTorch is not installed."""
  if importlib.util.find_spec('torch') is None:
    raise NoTwin('PyTorch is not installed')
  with tempfile.TemporaryDirectory() as folder:
    twin = Twin(sizes, steps, pathlib.Path(folder) / 'errors')
    try:
      yield twin
    finally:
      twin.process.kill()
      twin.process.wait()
