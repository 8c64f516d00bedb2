"""Recording the environment of a run: versions, git revision, device and processor."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

from sparse_lm.core.version import VERSION
from sparse_lm.measure.device import processor

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def environment() -> dict[str, str | int | None]:
  """Returns versions, git revision, device and processor as JSON values.

  Processors with other vector instructions add up sums in another order, so the same run has other last
  digits there. Results are therefore recorded with their processor.
  """
  return {
    'sparse_lm': VERSION,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    'git': _git_revision(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    **processor(),
    'cores': os.cpu_count(),
  }


def _git_revision() -> str:
  here = pathlib.Path(__file__).parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
