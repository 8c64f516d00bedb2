"""Names of processors and devices."""

import pytest

from sparse_lm.measure import device
from sparse_lm.measure.device import processor
from sparse_lm.runs.environment import environment

AMD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx avx2 bmi2

processor\t: 1
cpu family\t: 99
model name\t: another core
flags\t\t: fpu avx512f
"""
INTEL = AMD.replace('AMD EPYC', 'Intel(R) Xeon(R)').replace('avx2', 'avx2 avx512f')
ARM = 'processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd sha2\n'


@pytest.mark.parametrize(
  ('cpuinfo', 'cpu', 'instructions'),
  [
    (AMD, 'AMD EPYC (family 25, model 1)', 'AVX2'),
    (INTEL, 'Intel(R) Xeon(R) (family 25, model 1)', 'AVX-512'),
  ],
)
def test_the_first_core_gives_the_generation_and_the_widest_vectors(cpuinfo, cpu, instructions):
  assert processor(cpuinfo) == {'cpu': cpu, 'instruction_set': instructions}


def test_a_processor_without_a_model_name_is_its_architecture():
  assert processor(ARM)['instruction_set'] == 'NEON'
  assert processor('')['cpu'] and processor('')['instruction_set']


def test_a_run_records_both():
  assert {'cpu', 'instruction_set', 'cores', 'device', 'jax', 'git'} <= set(environment())


@pytest.mark.parametrize(
  ('backend', 'name', 'want'),
  [
    ('gpu', 'NVIDIA H200', 'nvidia-h200'),
    ('tpu', 'TPU v5 lite', 'tpu-v5-lite'),
    ('cpu', 'cpu', None),
  ],
)
def test_the_kind_of_a_device_names_a_file(backend, name, want, monkeypatch):
  class Device:
    device_kind = name

  monkeypatch.setattr(device.jax, 'devices', lambda: [Device()])
  monkeypatch.setattr(device.jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(device, '_cpuinfo', lambda: INTEL)
  assert device.kind() == (want or 'cpu-avx-512')
