"""Where a run was made: versions, git revision, device and processor."""

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
  """Versions, git revision, device and processor, as JSON values.

  Sums are added up in another order on processors with other vector instructions, so the same run has
  other last digits there: lines that are compared say on which processor they were made.
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
