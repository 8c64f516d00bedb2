import json
import shlex
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

import experiments
from experiments import study as study_module
from experiments.study import Study
from experiments.sweep import Run
from sparse_lm.report import results
from sparse_lm.runs import lock

STUDY = '''"""Does it run?

More on it.
"""
import json
import pathlib

from experiments.sweep import Run, grid, product
from sparse_lm.core.errors import UserError

HERE = pathlib.Path(__file__).parent


def runs():
  sweep = product(grid('weight.name', ['none', 'static']), grid('seed', [0, 1]))
  return [Run('configs/tiny.py', o, {'method': o['weight.name']}, execute) for o in sweep]


def execute(run, workdir):
  with (HERE / 'executed').open('a') as file:
    print(run.labels['method'], run.overrides['seed'], workdir.name, file=file)
  fail = HERE / f'fail_{run.labels["method"]}{run.overrides["seed"]}'
  if fail.exists():
    exec(fail.read_text())
  return {'metrics': {'loss': 1.5 + run.overrides['seed']}, 'config': {'seed': 7}, 'env': {'v': 1}}


def report(lines, folder):
  if not any(line['labels']['method'] == 'none' for line in lines):
    raise UserError('no baseline')
  return 'TABLE ' + ' '.join(f'{x["labels"]["method"]}{x["seed"]}={x["metrics"]["loss"]}' for x in lines)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with one study, `fake`, that stands in for `experiments/`."""
  path = tmp_path / 'studies'
  path.mkdir()
  (path / 'fake.py').write_text(STUDY)
  (path / 'sweep.py').write_text('"""Not a study."""\n')
  monkeypatch.setattr(experiments, '__path__', [str(path)])
  yield path
  sys.modules.pop('experiments.fake', None)
  vars(experiments).pop('fake', None)


@pytest.fixture
def command(run_study, tmp_path):
  """`command(argument, ...)`: what the command line does in the folder of these tests."""
  return lambda *arguments: run_study(*arguments, f'--results={tmp_path / "results"}')


def executed(folder):
  file = folder / 'executed'
  return (
    [' '.join(row.split()[:2]) for row in file.read_text().splitlines()] if file.exists() else []
  )


def written(tmp_path):
  return [
    json.loads(row) for row in (tmp_path / 'results/fake/runs.jsonl').read_text().splitlines()
  ]


def test_trains_everything_writes_lines_and_prints_the_table(folder, command, tmp_path):
  done = command('fake')
  assert done.code == 0
  assert done.out == 'TABLE none0=1.5 none1=2.5 static0=1.5 static1=2.5\n'
  lines = written(tmp_path)
  assert [(x['labels'], x['seed']) for x in lines] == [
    ({'method': m}, s) for m in ('none', 'static') for s in (0, 1)
  ]
  assert lines[3]['study'] == 'fake' and lines[3]['metrics'] == {'loss': 2.5}
  assert lines[3]['config'] == {'seed': 7} and lines[3]['env'] == {'v': 1}
  assert lines[3]['run'].startswith('static-seed1-') and lines[3]['run'] in lines[3]['command']
  assert '--config.weight.name=static' in lines[3]['command']
  assert (tmp_path / 'results/fake/runs' / lines[3]['run']).is_dir()
  assert '4/4' in done.err and 'static-seed1' in done.err


def test_a_second_call_trains_and_validates_nothing(folder, command, monkeypatch):
  first = command('fake')

  def refuse(run):
    raise AssertionError('a config was loaded')

  monkeypatch.setattr(study_module, '_load', refuse)
  assert command('fake').out == first.out
  assert len(executed(folder)) == 4


def test_a_lost_line_is_made_again_in_the_studys_order(folder, command, tmp_path):
  first = command('fake')
  file = tmp_path / 'results/fake/runs.jsonl'
  rows = file.read_text().splitlines(keepends=True)
  file.write_text(''.join(rows[1:3]) + rows[3][:40])
  assert command('fake').out == first.out
  assert executed(folder)[4:] == ['none 0', 'static 1']
  file.write_text(rows[0][:40])
  assert command('fake').out == first.out


def test_lines_of_runs_no_longer_planned_are_left_out(folder, command, tmp_path):
  first = command('fake')
  file = tmp_path / 'results/fake/runs.jsonl'
  results.append(file, results.read_file(file)[0] | {'run': 'old'})
  assert command('fake').out == first.out


def test_shards_share_the_work_and_say_what_is_missing(folder, command, tmp_path):
  one = command('fake', '--index=1', '--num_shards=2')
  assert executed(folder) == ['none 1', 'static 1']
  assert (
    one.out.startswith('TABLE none1=2.5 static1=2.5\n') and '2 of 4 runs are missing' in one.out
  )
  assert command('fake', '--index=0', '--num_shards=2').out.startswith('TABLE none0')
  assert len(written(tmp_path)) == len(executed(folder)) == 4


def test_a_shard_without_the_baseline_still_succeeds(folder, command):
  done = command('fake', '--index=3', '--num_shards=4')
  assert done.code == 0
  assert '3 of 4 runs are missing' in done.out and 'no baseline' in done.out


@given(st.integers(0, 12), st.integers(1, 15))
def test_shards_partition_the_runs(count, num_shards):
  runs = {str(i): Run('c', {'seed': i}, {}) for i in range(count)}
  study = Study('s', types.ModuleType('s'), None, runs)
  shards = [study.shard(index, num_shards) for index in range(num_shards)]
  ids = [run_id for shard in shards for run_id in shard]
  assert sorted(ids) == sorted(runs) and len(ids) == len(set(ids))
  assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_dry_run_prints_what_is_missing_and_runs_nothing(folder, command):
  fresh = command('fake', '--dry_run')
  assert fresh.out.startswith('# 0 of 4 runs are finished') and executed(folder) == []
  command('fake', '--index=0', '--num_shards=2')
  half = command('fake', '--dry_run')
  header, *commands = half.out.splitlines()
  assert header.startswith('# 2 of 4') and len(commands) == 2
  assert all('--config.seed=1' in command for command in commands)


def test_dry_run_refuses_a_wrong_config_and_names_the_run(folder, command):
  (folder / 'fake.py').write_text(STUDY.replace("['none', 'static']", "['none', 'statik']"))
  done = command('fake', '--dry_run')
  assert done.code == 2 and not done.out
  assert 'run statik-seed0-' in done.err and "unknown config.weight.name 'statik'" in done.err


def test_a_training_study_prints_the_training_commands(folder, command, tmp_path):
  (folder / 'fake.py').write_text(STUDY.replace(', execute)', ')'))
  words = shlex.split(command('fake', '--dry_run').out.splitlines()[1])
  assert words[:3] == ['python', '-m', 'sparse_lm.train']
  assert words[-1].startswith(f'--workdir={tmp_path}/results/fake/runs/none-seed0-')


def test_training_is_the_default(folder, command, monkeypatch, tmp_path):
  (folder / 'fake.py').write_text(STUDY.replace(', execute)', ')'))
  monkeypatch.setattr(study_module, '_train', lambda run, workdir: {'metrics': {'loss': 9.0}})
  assert command('fake').out.startswith('TABLE none0=9.0')


@pytest.mark.parametrize(
  ('stop', 'code', 'err'),
  [
    ("raise UserError('loss is nan')", 2, 'error: run static-seed0-'),
    ('raise SystemExit(143)', 143, ''),
    ('raise KeyboardInterrupt', 130, 'continues'),
  ],
)
def test_a_run_that_stops_leaves_no_line_and_keeps_the_others(
  folder, command, tmp_path, stop, code, err
):
  (folder / 'fail_static0').write_text(stop)
  done = command('fake')
  assert done.code == code and err in done.err and 'TABLE' not in done.out
  assert [x['seed'] for x in written(tmp_path)] == [0, 1]
  (folder / 'fail_static0').unlink()
  assert command('fake').code == 0
  assert executed(folder)[2:] == ['static 0', 'static 0', 'static 1']


def test_a_wrong_config_stops_everything_before_the_first_run(folder, command):
  (folder / 'fake.py').write_text(STUDY.replace("'static']", "'statc']"))
  done = command('fake')
  assert done.code == 2 and "did you mean 'static'" in done.err and executed(folder) == []


def test_a_run_planned_twice_is_refused(folder, command):
  (folder / 'fake.py').write_text(STUDY.replace('[0, 1]', '[1, 1]'))
  done = command('fake')
  assert done.code == 2 and 'twice' in done.err and executed(folder) == []


@pytest.mark.parametrize(
  ('arguments', 'hint'),
  [
    (['fak'], "did you mean 'fake'"),
    (['sweep'], 'valid: fake'),
    (['fake', '--index=2', '--num_shards=2'], '--index=2'),
    (['fake', '--index=-1'], "--index: '-1' is not valid"),
    (['fake', '--num_shards=0'], "--num_shards: '0' is not valid"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, command, arguments, hint):
  done = command(*arguments)
  assert (done.code, done.out) == (2, '')
  assert hint in done.err and done.err.count('\n') == 1 and done.err.startswith('error: ')
  assert executed(folder) == []


@pytest.mark.parametrize('arguments', [[], ['fake', '--dry'], ['fake', '--index=x']])
def test_bad_flags_exit_with_2(folder, command, arguments):
  assert command(*arguments).code == 2 and executed(folder) == []


def test_list_names_studies_with_their_questions(folder, command):
  (folder / 'broken_import.py').write_text('"""Another."""\nimport nowhere\ndef runs(): ...\n')
  assert command('--list').out == 'broken_import: Another.\nfake: Does it run?\n'


def test_list_is_instant():
  code = (
    'import sys; sys.argv = ["run", "--list"]; from experiments import run; run.main(); '
    'sys.exit(" ".join({"jax", "pandas", "matplotlib"} & set(sys.modules)) or 0)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


DIVERGE = "from sparse_lm.core.errors import Diverged\nraise Diverged('loss is nan at step 3')"


def test_a_diverged_run_is_recorded_and_the_others_go_on(folder, command, tmp_path):
  (folder / 'fail_none1').write_text(DIVERGE)
  done = command('fake')
  assert done.code == 0 and executed(folder) == ['none 0', 'none 1', 'static 0', 'static 1']
  assert done.out.startswith('TABLE none0=1.5 none1=nan static0=1.5')
  line = written(tmp_path)[1]
  assert line['failed'] == 'diverged' and line['message'] == 'loss is nan at step 3'
  assert (line['metrics'], line['seed'], line['study']) == ({}, 1, 'fake')
  assert f'Diverged: {line["run"]}; to train one again: ' in done.out and '--only=' in done.out
  # Again: nothing runs.
  assert command('fake').out == done.out and len(executed(folder)) == 4
  # Asked for, it runs again, and its new line counts.
  assert command('fake', f'--only={line["run"]}').out == done.out and len(executed(folder)) == 5
  (folder / 'fail_none1').unlink()
  assert command('fake', f'--only={line["run"]}').out.startswith('TABLE none0=1.5 none1=2.5')
  assert executed(folder)[4:] == ['none 1', 'none 1']


def test_when_all_have_diverged_there_is_no_table(folder, command):
  for name in ('none0', 'none1', 'static0', 'static1'):
    (folder / f'fail_{name}').write_text(DIVERGE)
  done = command('fake')
  assert done.code == 0 and '4 diverged: no table yet' in done.out


def test_only_one_run(folder, command, tmp_path):
  fresh = command('fake', '--dry_run').out.splitlines()
  run_id = next(word for word in fresh[2].split() if word.startswith('--only=')).removeprefix(
    '--only='
  )
  assert run_id.startswith('none-seed1-')
  done = command('fake', f'--only={run_id}')
  assert executed(folder) == ['none 1'] and '3 of 4 runs are missing' in done.out
  command('fake', f'--only={run_id}')
  assert executed(folder) == ['none 1']  # it has its line
  assert command('fake', f'--only={run_id}', '--dry_run').out.startswith(
    '# 1 of 1 runs are finished'
  )
  wrong = command('fake', '--only=none-seed1')
  assert wrong.code == 2 and wrong.err.count('\n') == 1 and f'did you mean {run_id!r}' in wrong.err


def test_a_second_worker_takes_other_runs(folder, command, tmp_path):
  study = Study.load('fake', tmp_path / 'results')
  first = next(iter(study.runs))
  study.workdir(first).mkdir(parents=True)
  with lock.held(study.workdir(first) / 'study.lock', 'x'):
    done = command('fake')
  assert done.code == 0 and executed(folder) == ['static 1', 'static 0', 'none 1']  # from the end
  assert 'skipped 1 of 4 runs: other processes work on them' in done.err
  assert 'run 2/4: static-seed1' in done.err and 'none-seed0' not in done.err
  assert '1 of 4 runs are missing' in done.out
  # A run whose training another process has begun by hand is left as well.
  held = "from sparse_lm.runs import lock\nraise lock.Held('workdir w is in use')"
  (folder / 'fail_none0').write_text(held)
  again = command('fake')
  assert again.code == 0 and 'skipped 1 of 4 runs' in again.err
  (folder / 'fail_none0').unlink()
  assert command('fake').code == 0 and sorted(executed(folder)[-1:]) == ['none 0']
  assert len(written(tmp_path)) == 4


def test_two_workers_run_nothing_twice(folder, tmp_path):
  """Two processes at once; a run takes long enough for them to meet at every one."""
  slow = 'def execute(run, workdir):\n  time.sleep(0.3)'
  study = STUDY.replace('def execute(run, workdir):', slow)
  (folder / 'fake.py').write_text(study.replace('import json\n', 'import json\nimport time\n'))
  code = (
    'import sys, experiments; from experiments import run, study, sweep; '
    f'experiments.__path__ = [{str(folder)!r}]; '
    'sweep.Run.seed = property(lambda r: r.overrides["seed"]); study._load = lambda r: r; '
    f'sys.argv = ["run", "fake", "--results={tmp_path / "results"}"]; run.main()'
  )
  workers = [
    subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2)
  ]
  said = [worker.communicate(timeout=120) for worker in workers]
  assert all(worker.returncode == 0 for worker in workers), said
  assert sorted(executed(folder)) == ['none 0', 'none 1', 'static 0', 'static 1']
  assert len({line['run'] for line in written(tmp_path)}) == len(written(tmp_path)) == 4


def test_a_study_loads_each_config_once(tmp_path, tiny_config, monkeypatch):
  loaded = []

  def load(run):
    loaded.append(run)
    return tiny_config(train__steps=2, seed=run.overrides['seed'])

  monkeypatch.setattr(study_module, '_load', load)
  runs = {
    f'seed{seed}': Run('configs/tiny.py', {'seed': seed}, {'method': 'dense'}) for seed in (0, 1)
  }
  made = Study('once', types.ModuleType('once'), tmp_path / 'once', runs)
  assert made.train(runs) == 0
  assert loaded == list(runs.values())
  assert [line['seed'] for line in made.finished().values()] == [0, 1]
