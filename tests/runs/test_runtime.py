"""What entry points set: the allocator only where JAX computes on the CPU, and the cache of programs."""

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys

import jax
import pytest

from sparse_lm.runs import runtime


@pytest.fixture
def prepared(monkeypatch):
  """The calls of mallopt and the settings of JAX that `prepare` makes, which are not carried out."""
  calls, settings = [], {}

  class Libc:
    def __init__(self, _):
      self.mallopt = lambda *arguments: calls.append(arguments)

  monkeypatch.setattr(ctypes, 'CDLL', Libc)
  monkeypatch.setattr(jax.config, 'update', settings.__setitem__)
  return calls, settings


@pytest.mark.parametrize(
  ('platforms', 'plugins', 'backend', 'is_set'),
  [
    ('cpu', True, 'none', True),
    ('cuda,cpu', False, 'none', False),
    ('tpu', False, 'none', False),
    (None, False, 'none', True),
    (None, True, 'gpu', False),
    (None, True, 'cpu', True),
  ],
)
def test_the_allocator_is_set_on_cpu_hosts_only(
  platforms, plugins, backend, is_set, prepared, monkeypatch
):
  mallopt, settings = prepared

  def default_backend():
    assert backend != 'none', 'a backend was started though it is known without'
    return backend

  with monkeypatch.context() as patch:
    patch.setattr(runtime.jax, 'default_backend', default_backend)
    patch.setattr(type(jax.config), 'jax_platforms', platforms, raising=False)
    patch.setattr(importlib.metadata, 'entry_points', lambda group: ['cuda'] * plugins)
    patch.setattr(importlib.util, 'find_spec', lambda name: None)
    runtime.prepare()
  assert bool(mallopt) == is_set
  assert len(mallopt) == (3 if is_set else 0)
  assert settings['jax_compilation_cache_dir'].endswith('sparse_lm/xla')
  # A warm start beside an accelerator compiles nothing.
  assert settings['jax_persistent_cache_min_compile_time_secs'] == (0.5 if is_set else 0)
  assert settings['jax_persistent_cache_min_entry_size_bytes'] == (0 if is_set else -1)


ARENAS = """
import ctypes
import os
import pathlib
import sys
import jax
from sparse_lm.runs import runtime
runtime.prepare()
step = jax.jit(lambda x: jax.numpy.sin(x @ x) @ x)
for _ in range(5):
  step(jax.numpy.ones((500, 500))).block_until_ready()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
file = libc.fopen(sys.argv[1].encode(), b'w')
libc.malloc_info(0, file)
libc.fclose(file)
print(pathlib.Path(sys.argv[1]).read_text().count('<heap nr'))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='arenas are those of glibc')
def test_the_threads_of_the_backend_share_one_arena(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', ARENAS, str(tmp_path / 'info.xml')],
    capture_output=True,
    text=True,
    check=True,
  )
  if not hasattr(ctypes.CDLL(None), 'mallopt'):
    pytest.skip('the C library is not glibc')
  assert jax.default_backend() != 'cpu' or done.stdout.strip() == '1'
