"""Memory and names of the device: the accelerator, or the processor and its vector instructions."""

import os
import pathlib
import platform
import re

import jax

# Vector instruction sets by their flag in /proc/cpuinfo, widest first: x86, then Arm.
INSTRUCTION_SETS = {
  'avx512f': 'AVX-512',
  'avx2': 'AVX2',
  'avx': 'AVX',
  'sve': 'SVE',
  'asimd': 'NEON',
}


def memory() -> int:
  """Returns the bytes of memory for arrays: those of the accelerator, or of the machine on a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit') or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def processor(cpuinfo: str | None = None) -> dict[str, str]:
  """Returns `cpu` (the model name, with family and model numbers if known) and `instruction_set`.

  Args:
    cpuinfo: contents of /proc/cpuinfo, '' on a system without it. By default, this system's file is read.
  """
  first: dict[str, str] = {}
  for line in (_cpuinfo() if cpuinfo is None else cpuinfo).splitlines():
    name, _, value = line.partition(':')
    first.setdefault(name.strip(), value.strip())
  cpu = first.get('model name') or platform.processor() or platform.machine()
  # The model name of a virtual machine may be only a brand; these numbers identify the generation.
  if 'cpu family' in first and 'model' in first:
    cpu += f' (family {first["cpu family"]}, model {first["model"]})'
  flags = (first.get('flags') or first.get('Features', '')).split()
  widest = (name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
  return {'cpu': cpu, 'instruction_set': next(widest, platform.machine())}


def kind() -> str:
  """Returns the kind of this device as part of a file name, such as 'nvidia-h200' or 'cpu-avx-512'."""
  if jax.default_backend() == 'cpu':
    return file_name('cpu', processor()['instruction_set'])
  return file_name(jax.devices()[0].device_kind)


def file_name(device: str, instruction_set: str = '') -> str:
  """Converts a device's name to part of a file name; that of a CPU includes its instruction set."""
  words = f'cpu {instruction_set}' if device == 'cpu' else device
  return re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')


def _cpuinfo() -> str:
  file = pathlib.Path('/proc/cpuinfo')
  return file.read_text() if file.exists() else ''
