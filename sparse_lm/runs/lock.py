"""File locks. The operating system releases a lock when its process ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import sys
from collections.abc import Iterator

from sparse_lm.core.errors import UserError, writing

# What `flock` raises on a file system without locks (some network and FUSE mounts).
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Held(UserError):
  """Another process holds the lock. The message names the process."""


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
  """Holds the lock file `path` while the block runs.

  The file is never removed: otherwise two processes could each lock a file of that name. It names its
  holder, which is meaningful only while the file is locked. If the file system has no locks, a line on
  stderr says so, and the block runs without a lock.

  Args:
    path: the lock file, in a folder that exists.
    what: the thing that the lock protects, for the message.

  Raises:
    Held: another process, or another block of this process, holds the lock.
  """
  with writing(path):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    if locked := _lock(descriptor, path, what):
      os.ftruncate(descriptor, 0)
      with writing(path):
        os.pwrite(descriptor, f'process {os.getpid()} on {socket.gethostname()}'.encode(), 0)
    try:
      yield
    finally:
      if locked:
        os.ftruncate(descriptor, 0)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def waited_for(descriptor: int) -> Iterator[None]:
  """Waits for the lock of an open file and holds it while the block runs.

  If the file system has no locks, the block runs without a lock.
  """
  with contextlib.suppress(OSError):
    fcntl.flock(descriptor, fcntl.LOCK_EX)
  try:
    yield
  finally:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, path: pathlib.Path, what: str) -> bool:
  """Locks the file. Returns False if its file system has no locks."""
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    holder = os.pread(descriptor, 200, 0).decode(errors='replace') or 'another process'
    raise Held(f'{what} is in use by {holder}; valid: wait until it ends, or stop it') from None
  except OSError as error:
    if error.errno not in _UNSUPPORTED:
      raise
    print(
      f'{path.parent} is on a file system without locks ({error.strerror}): let no second process '
      'use it meanwhile',
      file=sys.stderr,
    )
    return False
  return True
