"""Folders of runs: written as a whole, by one process at a time, wherever the name leads."""

import errno
import pathlib

import pytest

from sparse_lm.core.errors import UserError
from sparse_lm.data import pipeline
from sparse_lm.runs import configs, lock, trained
from sparse_lm.runs import workdir as workdirs
from sparse_lm.runs.loop import train
from sparse_lm.runs.run_folder import read_config, with_format
from sparse_lm.runs.workdir import Workdir, check_new, read_log, whole_folder, write_json


@pytest.fixture
def folder(tiny_config, tmp_path):
  """`folder(path)`: a workdir that is not open yet."""
  config = tiny_config()
  data = pipeline.load(config.data)
  return lambda path=tmp_path / 'run': Workdir(str(path), config, data)


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'out'
  with pytest.raises(ZeroDivisionError), whole_folder(path) as writing:
    (writing / 'half').touch()
    raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []
  # What a process that was killed has left is in nobody's way.
  (tmp_path / '.incomplete-out' / 'out').mkdir(parents=True)
  (tmp_path / '.incomplete-out' / 'out' / 'half').touch()
  with whole_folder(path) as writing:
    (writing / 'file').touch()
    assert not path.exists()
    with pytest.raises(lock.Held, match='is in use by process'), whole_folder(path):
      pass
  assert [file.name for file in path.iterdir()] == ['file']
  assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_folder(tmp_path):
  with pytest.raises(UserError, match=r'out cannot be written \(No space left on device\)'):  # noqa: SIM117
    with whole_folder(tmp_path / 'out'):
      raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_new_folder_must_not_exist_or_be_empty(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').touch()
  check_new(str(tmp_path / 'empty'), '--out')
  check_new(str(tmp_path / 'new' / 'one'), '--out')
  for taken in (tmp_path, tmp_path / 'file', ''):
    with pytest.raises(UserError, match='--out='):
      check_new(str(taken), '--out')


def test_one_process_at_a_time(folder, tmp_path):
  first, second = folder(), folder()
  first.open()
  before = {file: file.read_bytes() for file in (tmp_path / 'run').iterdir()}
  with pytest.raises(lock.Held, match=r'workdir .*run is in use by process \d+ on '):
    second.open()
  assert {file: file.read_bytes() for file in (tmp_path / 'run').iterdir()} == before
  first.close()
  second.open()
  second.close()


def test_home_is_expanded_and_an_empty_path_refused(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert folder('~/run').path == tmp_path / 'run'
  with pytest.raises(UserError, match="workdir='' is not valid"):
    folder('')


def test_a_full_disk_at_a_line_of_the_log_is_one_line(folder, monkeypatch):
  run = folder()
  run.open()
  run.log(1, {'loss': 1.0})

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(workdirs.EventsWriter, 'write_event', full)
    with pytest.raises(UserError, match=r'events cannot be written \(No space left on device\)'):
      run.log(2, {'loss': 1.0})
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'open', full)
    with pytest.raises(UserError, match=r'metrics\.jsonl cannot be written'):
      run.log(3, {'loss': 1.0})
  run.close()


def test_a_run_that_an_older_version_began_is_continued(tiny_config, tmp_path):
  """Its config.json lacks fields that joined since, and stays so: checkpoints have its digest."""
  config = tiny_config(train__steps=2)
  values = with_format(configs.to_json(config))
  joined = [values['model'].pop(field) for field in ('norm_epsilon', 'biases')]
  assert joined == [1e-5, []]
  write_json(tmp_path / 'config.json', values)
  for steps in (2, 4):
    train(tiny_config(train__steps=steps), str(tmp_path), progress=False)
  found = read_config(tmp_path)
  assert found['train']['steps'] == 4 and not {'norm_epsilon', 'biases'} & {*found['model']}
  assert trained.load(str(tmp_path)).step == 4
  logged = [values['step'] for _, values in read_log(tmp_path / 'metrics.jsonl')]
  assert logged == sorted(logged) and {*logged} == {1, 2, 3, 4}
  changed = tiny_config(train__steps=4, model__norm_epsilon=1e-6)
  with pytest.raises(UserError, match=r'config\.model\.norm_epsilon=1e-05, not 1e-06'):
    train(changed, str(tmp_path), progress=False)
