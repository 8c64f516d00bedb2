"""What an entry point sets before the first array: the allocator and the compilation cache."""

import ctypes
import os
import pathlib

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def prepare() -> None:
  """Keeps freed memory in the process and compiled programs on disk.

  XLA:CPU frees its scratch after each step, and faulting the pages in again costs 5 to 50 % of a
  step, so glibc is told to keep them. Compiled programs are cached under the user's cache folder:
  another process of a study starts in seconds.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
      libc.mallopt(parameter, value)
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()
  jax.config.update('jax_compilation_cache_dir', str(cache / 'sparse_lm' / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
