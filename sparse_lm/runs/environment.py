"""Where a run was made: versions, git revision, device and processor."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
# The widest vector instructions first, by the flag that Linux lists for them: x86, then Arm.
INSTRUCTION_SETS = {
  'avx512f': 'AVX-512',
  'avx2': 'AVX2',
  'avx': 'AVX',
  'sve': 'SVE',
  'asimd': 'NEON',
}


def environment() -> dict[str, Any]:
  """Versions, git revision, device and processor, as JSON values.

  Sums are added up in another order on processors with other vector instructions, so the same run has
  other last digits there: lines that are compared say on which processor they were made.
  """
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    'git': _git_revision(),
    'device': jax.devices()[0].device_kind,
    'devices': jax.device_count(),
    **processor(_cpuinfo()),
    'cores': os.cpu_count(),
  }


def processor(cpuinfo: str) -> dict[str, str]:
  """`cpu` (model name, with family and model where they are given) and `instruction_set`.

  Args:
    cpuinfo: the contents of /proc/cpuinfo, or '' on a system without it.
  """
  first: dict[str, str] = {}
  for line in cpuinfo.splitlines():
    name, _, value = line.partition(':')
    first.setdefault(name.strip(), value.strip())
  cpu = first.get('model name') or platform.processor() or platform.machine()
  # A virtual machine's model name may be no more than a brand; these numbers tell generations apart.
  if 'cpu family' in first and 'model' in first:
    cpu += f' (family {first["cpu family"]}, model {first["model"]})'
  flags = (first.get('flags') or first.get('Features', '')).split()
  widest = (name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
  return {'cpu': cpu, 'instruction_set': next(widest, platform.machine())}


def _cpuinfo() -> str:
  file = pathlib.Path('/proc/cpuinfo')
  return file.read_text() if file.exists() else ''


def _git_revision() -> str:
  here = pathlib.Path(__file__).parent
  command = ['git', '-C', str(here), 'describe', '--always', '--dirty', '--abbrev=12']
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'
