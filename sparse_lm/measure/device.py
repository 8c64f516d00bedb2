"""What runs here: the accelerator, or the processor and its vector instructions."""

import pathlib
import platform
import re

import jax

# The widest vector instructions first, by the flag that Linux lists for them: x86, then Arm.
INSTRUCTION_SETS = {
  'avx512f': 'AVX-512',
  'avx2': 'AVX2',
  'avx': 'AVX',
  'sve': 'SVE',
  'asimd': 'NEON',
}


def processor(cpuinfo: str | None = None) -> dict[str, str]:
  """`cpu` (model name, with family and model where they are given) and `instruction_set`.

  Args:
    cpuinfo: the contents of /proc/cpuinfo, '' on a system without it; by default this system's.
  """
  first: dict[str, str] = {}
  for line in (_cpuinfo() if cpuinfo is None else cpuinfo).splitlines():
    name, _, value = line.partition(':')
    first.setdefault(name.strip(), value.strip())
  cpu = first.get('model name') or platform.processor() or platform.machine()
  # A virtual machine's model name may be no more than a brand; these numbers tell generations apart.
  if 'cpu family' in first and 'model' in first:
    cpu += f' (family {first["cpu family"]}, model {first["model"]})'
  flags = (first.get('flags') or first.get('Features', '')).split()
  widest = (name for flag, name in INSTRUCTION_SETS.items() if flag in flags)
  return {'cpu': cpu, 'instruction_set': next(widest, platform.machine())}


def kind() -> str:
  """The kind of device that arrays are on, fit for the name of a file.

  It is 'nvidia-h200', say, of an accelerator; of a CPU it names its instruction set: 'cpu-avx-512'.
  """
  if jax.default_backend() == 'cpu':
    return file_name('cpu', processor()['instruction_set'])
  return file_name(jax.devices()[0].device_kind)


def file_name(device: str, instruction_set: str = '') -> str:
  """A device's name, fit for the name of a file; that of a CPU holds its instruction set."""
  words = f'cpu {instruction_set}' if device == 'cpu' else device
  return re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')


def _cpuinfo() -> str:
  file = pathlib.Path('/proc/cpuinfo')
  return file.read_text() if file.exists() else ''
