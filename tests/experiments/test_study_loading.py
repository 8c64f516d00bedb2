"""Studies are found by name in the package and by path anywhere else."""

import pathlib
import sys

import pytest

from experiments import loading

OUTSIDE = '''"""Does it load?"""

from experiments.sweep import Run
from helper_beside_it import SEEDS


def runs():
  return [Run('configs/tiny.py', {'seed': seed}, {'method': 'none'}, execute) for seed in SEEDS]


def execute(run, workdir):
  return {'metrics': {'loss': 1.0 + run.overrides['seed']}}


def report(lines, folder):
  return f'TABLE {[line["metrics"]["loss"] for line in lines]}'
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
  """A study outside the package, with a module beside it."""
  monkeypatch.setattr(sys, 'path', list(sys.path))
  folder = tmp_path / 'my studies'
  folder.mkdir()
  (folder / 'helper_beside_it.py').write_text('SEEDS = (3, 4)\n')
  (folder / 'outside.py').write_text(OUTSIDE)
  yield folder / 'outside.py'
  sys.modules.pop('helper_beside_it', None)
  sys.modules.pop('study_outside', None)


def test_studies_of_the_package_are_found_however_they_define_their_runs():
  found = loading.questions()
  assert found['patterns'].endswith('?')
  assert 'packed_sweep' in found and 'sweep' not in found and 'comparison' not in found


def test_a_study_outside_the_package_runs_continues_and_names_its_file(file, run_study, tmp_path):
  results = f'--results={tmp_path / "results"}'
  listed = run_study(str(file), results, '--dry_run')
  assert listed.code == 0 and f"python -m experiments.run '{file}' --results=" in listed.out
  first = run_study(str(file), results, '--index=0', '--num_shards=2')
  assert first.code == 0 and first.out.startswith('TABLE [4.0]') and '1 of 2 runs' in first.out
  assert run_study(str(file), results).out == 'TABLE [4.0, 5.0]\n'
  assert (tmp_path / 'results' / 'outside' / 'runs.jsonl').exists()


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (None, "unknown study file '{path}"),
    ('runs = 1\n', 'study {path} defines no function runs; valid: both runs()'),
    ('def report(): ...\n', 'study {path} defines no function runs'),
    ('def runs(): return []\n', 'study {path} defines no function report'),
    (
      'def runs(): return []\ndef report(): ...\n',
      'runs() returns an empty list; valid: a list of',
    ),
    ('def runs(): return [1]\ndef report(): ...\n', 'runs() returns a list that holds int; valid:'),
    ('def runs(): return None\ndef report(): ...\n', 'returns a value of type NoneType; valid:'),
    ('\n\nimport nowhere\n', 'study {path} fails in line 3: ModuleNotFoundError: '),
    ('def runs(:\n', 'study {path} fails in line 1: SyntaxError: '),
    ('def runs():\n  return 1 / 0\n', 'study {path} fails in line 2: ZeroDivisionError: '),
    (
      "from sparse_lm.core.errors import UserError\nraise UserError('x=1; valid: 2')\n",
      'study {path}: x=1; valid: 2',
    ),
  ],
)
def test_a_bad_file_is_one_line_and_exit_code_2(file, run_study, tmp_path, text, message):
  path = file.with_name('bad.py')
  if text is not None:
    path.write_text(text)
  done = run_study(str(path), f'--results={tmp_path / "results"}')
  assert (done.code, done.out) == (2, '') and done.err.count('\n') == 1
  start, _, rest = message.partition('{path}')
  assert start in done.err and rest in done.err.replace('...', ''), done.err
  assert not (tmp_path / 'results').exists()


def test_a_file_may_not_share_the_results_of_a_study_of_the_package(file, run_study):
  file.rename(file.with_name('patterns.py'))
  done = run_study(str(file.with_name('patterns.py')))
  assert done.code == 2 and "'patterns' is the name of a study" in done.err


def test_the_path_of_a_study_of_the_package_is_its_name():
  folder = pathlib.Path(loading.__file__).parent
  assert loading.shortened(str(folder / 'patterns.py')) == 'patterns'
  for other in (str(folder / 'sweep.py'), 'elsewhere/patterns.py', 'patterns'):
    assert loading.shortened(other) == other


def test_an_unknown_name_suggests_a_name_and_a_path(run_study):
  done = run_study('paterns')
  assert done.code == 2 and "did you mean 'patterns'" in done.err and 'path of a study' in done.err
