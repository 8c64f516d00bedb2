"""Settings of the process: the memory allocator and the cache of compiled programs."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import pathlib

import jax

from sparse_lm.measure.device import memory as memory  # also for the modules of this room

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def prepare() -> None:
  """Sets up the memory allocator and the cache of compiled programs. Call it before the first array.

  On a CPU, XLA frees its scratch memory after each step. Faulting the pages in again costs 5 to 50 % of
  a step, so glibc is told to keep them. On an accelerator host, steps allocate nothing in glibc, and
  the many threads of the compiler would contend for its single arena, so nothing is changed.

  Compiled programs are cached in the user's cache folder, so that further processes start in seconds. On
  an accelerator every program is cached, because even a small one takes longer to compile than to read.
  XLA's autotuning results are cached with the programs.
  """
  on_cpu = _computes_on_cpu()
  if on_cpu:
    with contextlib.suppress(AttributeError):  # a C library without it
      mallopt = ctypes.CDLL(None).mallopt
      for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
        mallopt(parameter, value)
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
  jax.config.update('jax_compilation_cache_dir', str(cache / 'sparse_lm' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5 if on_cpu else 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0 if on_cpu else -1)


def _computes_on_cpu() -> bool:
  """True if the CPU is JAX's default backend.

  The number of arenas must be set before the CPU backend starts its threads. So JAX is asked only if no
  setting names a platform and a plugin for another device is installed.
  """
  if platforms := jax.config.jax_platforms:
    return platforms.partition(',')[0] == 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  if not plugins and not any(map(importlib.util.find_spec, ('jax_plugins', 'libtpu'))):
    return True
  return jax.default_backend() == 'cpu'
