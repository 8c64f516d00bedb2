"""Commands end with one line and an exit code, also if the operating system refuses something."""

import errno
import importlib
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.commands.parser import LONGEST_LINE, Parser, local_path, one_line, shortened
from sparse_lm.core import errors
from sparse_lm.core.errors import UserError

COMMANDS = (
  'sparse_lm.train.__main__',
  'sparse_lm.prune',
  'sparse_lm.pack',
  'sparse_lm.generate',
  'sparse_lm.speed',
  'sparse_lm.format_costs',
  'sparse_lm.cost',
  'sparse_lm.list_methods',
  'sparse_lm.data.prepare',
  'sparse_lm.report.__main__',
  'experiments.run',
)


def outcome(main, capsys):
  """Exit code and stderr of an entry point."""
  with pytest.raises(SystemExit) as stopped:
    one_line(main)()
  return stopped.value.code, capsys.readouterr().err


def raising(error):
  def main():
    raise error

  return main


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (UserError('x=1; valid: 2'), 2, 'error: x=1; valid: 2\n'),
    (OSError(errno.ENOSPC, 'No space left on device'), 2, 'No space left on device\n'),
    (OSError(errno.EROFS, 'Read-only file system', '/w'), 2, 'error: /w: Read-only file system\n'),
    (OSError('without a number'), 2, 'without a number\n'),
    (OSError(errno.ENAMETOOLONG, 'File name too long', 'n' * 300), 2, 'File name too long\n'),
    (KeyboardInterrupt(), 130, 'stopped; the same command continues or starts again\n'),
    (BrokenPipeError(errno.EPIPE, 'Broken pipe'), 141, ''),
    (UnicodeEncodeError('ascii', 'a Δ', 2, 3, 'no'), 2, 'PYTHONIOENCODING=utf-8\n'),
  ],
)
def test_one_line_and_the_exit_code(error, code, line, capsys):
  got, said = outcome(raising(error), capsys)
  assert got == code and said.endswith(line) and said.count('\n') == (1 if line else 0)
  assert len(said) <= LONGEST_LINE + 1


def test_ctrl_c_within_a_callback_is_not_forgotten(capsys):
  class Collected:
    def __del__(self):
      raise KeyboardInterrupt  # Python prints what a destructor raises, and goes on

  def main():
    Collected()
    time.sleep(20)

  begin = time.monotonic()
  old = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel test runners ignore it
  try:
    code, said = outcome(main, capsys)
  finally:
    signal.signal(signal.SIGINT, old)
  assert code == 130 and said.count('\n') == 1 and time.monotonic() - begin < 10


def test_a_defect_keeps_its_traceback():
  with pytest.raises(ZeroDivisionError):
    one_line(raising(ZeroDivisionError()))()


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_output_to_a_full_disk_is_one_line(monkeypatch, capsys):
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    code, said = outcome(lambda: print('a table'), capsys)
  assert code == 2 and 'No space left on device' in said and said.count('\n') == 1


def test_a_closed_pipe_is_quiet(monkeypatch, capsys):
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, 'w') as pipe:
    monkeypatch.setattr(sys, 'stdout', pipe)
    assert outcome(lambda: print('a table'), capsys) == (128 + signal.SIGPIPE, '')


def test_an_encoding_without_the_character_is_named(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'latin-1'))
  code, said = outcome(lambda: print('Δ'), capsys)
  assert code == 2 and "'Δ'" in said and 'latin-1' in said and said.count('\n') == 1


def test_a_closed_output_is_no_failure(monkeypatch):
  monkeypatch.setattr(sys, 'stdout', None)
  one_line(lambda: print('nowhere'))()


def test_the_real_thing():
  """The process of an entry point, whose Python flushes its output once more as it ends."""
  code = 'from sparse_lm.commands.parser import one_line\none_line(lambda: print("x" * 9999))()'
  command = [sys.executable, '-c', code]
  run = {'stderr': subprocess.PIPE, 'text': True, 'timeout': 60}
  read, write = os.pipe()
  os.close(read)
  closed = subprocess.run(command, stdout=write, **run)
  os.close(write)
  assert (closed.returncode, closed.stderr) == (141, '')
  if os.path.exists('/dev/full'):
    with open('/dev/full', 'w') as full:
      done = subprocess.run(command, stdout=full, **run)
    assert done.returncode == 2 and done.stderr.count('\n') == 1


def test_ctrl_c_while_modules_are_imported_is_one_line():
  code = 'import sys; sys.argv = ["-m"]; import sparse_lm; raise KeyboardInterrupt'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert done.stderr == 'stopped\n' and done.returncode in (130, -signal.SIGINT)


@settings(max_examples=50)
@given(st.text(max_size=700))
def test_a_shortened_line_keeps_its_ends(text):
  line = shortened(text)
  assert len(line) <= LONGEST_LINE and len(line.splitlines()) <= 1
  whole = ' '.join(text.splitlines())
  assert line == whole if len(whole) <= LONGEST_LINE else len(line) == LONGEST_LINE
  assert line[:190] == whole[:190] and line[-90:] == whole[-90:]


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_the_same_ending(name, monkeypatch, capsys):
  module = importlib.import_module(name)
  monkeypatch.setattr(sys, 'argv', [name, '--no-such-argument'])
  with pytest.raises(SystemExit) as stopped:
    module.main()
  said = capsys.readouterr().err
  assert stopped.value.code == 2 and said.startswith('error: ') and said.count('\n') == 1


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_expands_home_and_refuses_an_empty_path(name, monkeypatch, tmp_path):
  """Every argument that names a file or folder says so by its type."""
  given = []

  class Stop(Exception):
    pass

  def parse(self, *_):
    given.extend(self._actions)
    raise Stop

  monkeypatch.setattr(Parser, 'parse_args', parse)
  monkeypatch.setattr(Parser, 'parse_known_args', parse)
  monkeypatch.setattr(sys, 'argv', [name])
  with pytest.raises(Stop):
    importlib.import_module(name).main()
  paths = {'workdir', 'out', 'config', 'files', 'paths', 'figure', 'results', 'train', 'validation'}
  named = {action.dest: action.type for action in given}
  assert all(kind is local_path for dest, kind in named.items() if dest in {*paths, 'test'})


def test_a_path_is_expanded_and_not_empty(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  parser = Parser('x')
  parser.add_argument('--workdir', type=local_path)
  assert parser.parse_args(['--workdir=~/a b[1]']).workdir == '/home/me/a b[1]'
  with pytest.raises(UserError, match="--workdir: '' is not valid; valid: a file or a folder"):
    parser.parse_args(['--workdir='])


def test_writing_names_the_path():
  with pytest.raises(UserError, match=r'/w/x cannot be written \(No space left on device\)'):  # noqa: SIM117
    with errors.writing('/w/x'):
      raise OSError(errno.ENOSPC, 'No space left on device')


@settings(max_examples=40, deadline=None)
@given(
  st.lists(st.text('abcdef._', min_size=1, max_size=12), unique=True, min_size=1), st.text('abc')
)
def test_a_list_of_names_is_whole_or_says_how_many_more_there_are(names, near):
  text = errors.listed(names, near, room=50)
  shown, _, more = text.partition(' and ')
  shown = shown.split(', ')
  assert [name for name in names if name in shown] == shown
  assert int(more.partition(' ')[0] or 0) == len(names) - len(shown)
  assert len(text) <= 50 or len(shown) == 1
  assert not more or len(', '.join(names)) > 50


def test_a_long_list_of_names_shows_those_closest_to_what_was_given():
  names = [f'config.model.field_{number}' for number in range(100)]
  message = str(errors.unknown('field', 'config.model.field_77x', names))
  assert 'config.model.field_77' in message.split('valid: ')[1]
  assert len(f'error: {message}') <= LONGEST_LINE and shortened(message) == message
  assert message.endswith(f'and {100 - message.split("valid: ")[1].count("config")} more')
