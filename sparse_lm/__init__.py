"""Sparse language models in JAX and Flax.

`run = sparse_lm.load(path)` loads a trained or packed model; see `sparse_lm.loading.Run`.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sparse_lm.loading import Run, load

__all__ = ['Run', 'load']


def __getattr__(name: str) -> object:
  """Imports the public names when they are first used: `import sparse_lm` alone imports no JAX."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('sparse_lm.loading'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


def _quiet_interrupt(kind: type, error: BaseException, trace: object) -> None:
  if issubclass(kind, KeyboardInterrupt):
    print('stopped', file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


# `sys.argv` is ['-m', ...] while `python -m sparse_lm.train` imports its modules, which takes seconds.
# Ctrl-C must print no traceback then either.
if sys.argv[:1] == ['-m']:
  sys.excepthook = _quiet_interrupt
