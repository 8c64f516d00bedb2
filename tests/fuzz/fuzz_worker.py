"""A process that runs one input after the other within limits, and what keeps and watches it.

Starting an interpreter with JAX takes seconds, an input tenths of one: inputs share a process, and
one that hangs, dies or asks for too much memory takes only the process with it.
"""

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from sparse_lm.commands.parser import LONGEST_LINE

PROCESSOR_SECONDS = 10  # of an input; a machine that is busy with other work does not lengthen them
CLOCK_SECONDS = 300  # for what waits without computing, on a busy machine too
MEMORY = 4 << 30  # bytes of address space that an input may add


class Died(Exception):
  """The input took the process with it: a hang, a crash, or memory that ran out."""


class Worker:
  """Runs `case(seed, folder)` of a module beside this file in a process of its own.

  Attributes:
    module: its name, such as 'fuzz_configs'.
    folder: for what the inputs of the module share.
  """

  def __init__(self, module: str, folder: pathlib.Path) -> None:
    self.module, self.folder = module, folder
    self._process: subprocess.Popen | None = None

  def run(self, seed: int) -> dict[str, Any]:
    """What the module's `case` returned. Raises Died, with the stack, where it did not return."""
    process = self._process or self._start()
    process.stdin.write(f'{seed}\n')
    process.stdin.flush()
    if not select.select([process.stdout], [], [], CLOCK_SECONDS)[0]:
      process.send_signal(signal.SIGPROF)  # as if its processor time were used up
    answer = process.stdout.readline()
    if answer:
      return json.loads(answer)
    self.close()
    raise Died(f'exit status {process.returncode}\n{self._log.read_text(errors="replace")[-4000:]}')

  def close(self) -> None:
    """Ends the process."""
    if self._process:
      self._process.stdin.close()
      self._process.wait()
      self._process = None

  @property
  def _log(self) -> pathlib.Path:
    return self.folder / 'log.txt'

  def _start(self) -> subprocess.Popen:
    root = pathlib.Path(__file__).resolve().parents[2]
    with self._log.open('w') as log:
      self._process = subprocess.Popen(
        [sys.executable, __file__, self.module, str(self.folder)],
        cwd=root,
        env=os.environ | {'PYTHONPATH': str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
      )
    if self._process.stdout.readline() != 'ready\n':
      self.close()
      raise RuntimeError(self._log.read_text(errors='replace'))
    return self._process


@dataclasses.dataclass
class Shown:
  """What a command left: its exit status, and what it wrote to both outputs."""

  status: int
  out: str
  err: str

  def fault(self) -> str:
    """What is wrong with how the command ended; '' where it did its work or refused in one line."""
    lines = self.err.strip().splitlines()
    if 'Traceback' in self.out + self.err:
      return 'a traceback'
    if self.status == 0:
      return ''
    if self.status != 2:
      return f'exit status {self.status}'
    if not lines or not lines[-1].startswith('error: '):
      return 'exit status 2 without a line that says why'
    if self.out and any(line.startswith('error') for line in lines[:-1]):
      return 'more than one error line'
    longest = LONGEST_LINE + len('error: ')
    return f'a line of over {LONGEST_LINE} characters' if len(lines[-1]) > longest else ''


def command(main: Callable[[], None], *arguments: str) -> Shown:
  """Runs an entry point as the shell would, in this process."""
  argv = sys.argv
  sys.argv = [main.__module__, *arguments]
  with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as err:
    with _onto(1, out), _onto(2, err):
      status = _status(main)
    for file in (out, err):
      file.seek(0)
    sys.argv = argv
    shown = [file.buffer.read().decode(errors='replace') for file in (out, err)]
    return Shown(status, *shown)


def _status(main: Callable[[], None]) -> int:
  try:
    main()
  except SystemExit as left:
    return left.code if isinstance(left.code, int) else int(left.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


@contextlib.contextmanager
def _onto(descriptor: int, file: Any) -> Any:
  """Leads a file descriptor, with what libraries in C write to it, to `file`."""
  streams = (sys.stdout, sys.stderr)
  kept = os.dup(descriptor)
  os.dup2(file.fileno(), descriptor)
  try:
    yield
  finally:
    for stream in streams:
      stream.flush()
    os.dup2(kept, descriptor)
    os.close(kept)


def allow(seconds: float) -> None:
  """Gives the input so much processor time from now on; 0 = any."""
  signal.setitimer(signal.ITIMER_PROF, seconds)


@contextlib.contextmanager
def limits() -> Any:
  """Ends the process, with its stack on stderr, where an input takes too long, and refuses it memory."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
  allow(PROCESSOR_SECONDS)
  yield
  allow(0)
  resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _serve(module: str, folder: pathlib.Path) -> None:
  channel = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  case = importlib.import_module(module)
  case.prepare(folder)
  # A dump of the stack, and then what the signal does by default: it ends the process.
  faulthandler.register(signal.SIGPROF, file=os.dup(2), chain=True)
  print('ready', file=channel, flush=True)
  for line in sys.stdin:
    with limits():
      found = case.case(int(line), folder)
    print(json.dumps(found), file=channel, flush=True)


if __name__ == '__main__':
  _serve(sys.argv[1], pathlib.Path(sys.argv[2]))
