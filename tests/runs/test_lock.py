"""A lock holds against other processes, says who holds it, and ends with its holder."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from sparse_lm.runs import lock

# Holds the lock until it is killed.
HOLDER = """
import pathlib, sys, time
from sparse_lm.runs import lock
with lock.held(pathlib.Path(sys.argv[1]), 'x'):
  print('held', flush=True)
  time.sleep(60)
"""


def test_the_message_names_the_process_that_holds_the_lock(tmp_path):
  path = tmp_path / 'lock'
  other = subprocess.Popen([sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE)
  try:
    assert other.stdout.readline() == b'held\n'
    with pytest.raises(lock.Held) as refused, lock.held(path, 'workdir w'):
      pass
    holder = f'process {other.pid} on {socket.gethostname()}'
    assert str(refused.value).startswith(f'workdir w is in use by {holder}; valid: ')
  finally:
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
  with lock.held(path, 'workdir w'):
    assert path.read_text() == f'process {os.getpid()} on {socket.gethostname()}'
  assert path.read_text() == ''


def test_the_same_process_is_refused_too_and_an_error_releases(tmp_path):
  path = tmp_path / 'lock'
  with lock.held(path, 'x'), pytest.raises(lock.Held), lock.held(path, 'x'):
    pass
  with pytest.raises(ZeroDivisionError), lock.held(path, 'x'):
    raise ZeroDivisionError
  with lock.held(path, 'x'):
    pass


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
  def flock(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', flock)
  with lock.held(tmp_path / 'lock', 'x'):
    pass
  said = capsys.readouterr().err
  assert str(tmp_path) in said and 'without locks' in said and said.count('\n') == 1


def test_a_child_process_does_not_keep_the_lock(tmp_path):
  with lock.held(tmp_path / 'lock', 'x'):
    child = subprocess.Popen(['sleep', '60'])
  try:
    with lock.held(tmp_path / 'lock', 'x'):
      pass
  finally:
    child.kill()
    child.wait()
