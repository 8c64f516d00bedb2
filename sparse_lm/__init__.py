"""Sparse language models in JAX and Flax."""

import sys


def _quiet_interrupt(kind: type, error: BaseException, trace: object) -> None:
  if issubclass(kind, KeyboardInterrupt):
    print('stopped', file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


# Python sets this name while `python -m sparse_lm.train` still imports, which takes seconds: Ctrl-C is
# to print no traceback there either.
if sys.argv[:1] == ['-m']:
  sys.excepthook = _quiet_interrupt
