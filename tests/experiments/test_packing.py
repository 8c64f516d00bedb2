"""Studies whose runs are packed."""

import types

import pytest

from experiments import packed_smoke, packed_sweep, packing
from experiments.study import Study
from experiments.sweep import Run
from sparse_lm.report import results
from sparse_lm.runs import configs, lock, runtime
from sparse_lm.runs.packs import Pack
from sparse_lm.runs.setup import setup

PROGRAM = {'weight.name': 'static', 'train.eval_every': 6, 'train.log_every': 4}


@pytest.fixture
def small(tiny_config, text_file):
  """The overrides of a config of the tests' size."""
  flat = configs.flat(tiny_config())
  names = [name for name in flat if name.partition('.')[0] in ('data', 'model', 'train')]
  return {name: flat[name] for name in names} | PROGRAM


@pytest.fixture
def study(small, tmp_path, monkeypatch):
  """`study(overrides, ...)`: the study of these runs, which the command line then finds."""

  def plan(*overrides, execute=()):
    runs = [
      Run('configs/tiny.py', small | own, {'number': number})
      for number, own in enumerate(overrides)
    ]
    runs += [Run('configs/tiny.py', {}, {'number': 'other'}, function) for function in execute]
    report = lambda lines, folder: f'TABLE of {len(lines)}'  # noqa: E731
    module = types.SimpleNamespace(runs=lambda: runs, report=report)
    by_id = {run.id('fake'): run for run in runs}
    made = Study('fake', module, tmp_path / 'fake', by_id)
    monkeypatch.setattr(Study, 'load', classmethod(lambda *_: made))
    return made

  return plan


@pytest.fixture
def command(run_study):
  """`command(argument, ...)`: what the command line prints of the study with these arguments."""
  return lambda *arguments: run_study('fake', *arguments)


def execute(run, workdir):
  return {'metrics': {'loss': 1.0}}


THREE = [{'seed': 0}, {'seed': 1, 'weight.sparsity': 0.5}, {'seed': 2}]


@pytest.mark.slow
def test_a_study_trains_its_packs_and_what_runs_alone(study, command):
  fake = study(*THREE, {'model.width': 32}, execute=[execute])
  shown = command('--pack=4', '--dry_run')
  titles = [line for line in shown.out.splitlines() if line.startswith('#')]
  assert titles == [
    '# 0 of 5 runs are finished; missing:',
    '# a pack of 3 runs',
    '# alone: no other run has the same program',
    '# alone: it trains no model',
  ]
  shown = command('--pack=4')
  assert (shown.code, shown.out) == (0, 'TABLE of 5\n')
  lines = results.read_file(fake.file)
  assert [line['metrics'].get('packed_runs') for line in lines] == [3, 3, 3, None, None]
  assert [line['seed'] for line in lines[:3]] == [0, 1, 2]
  assert lines[1]['metrics']['sparsity_prunable'] == 0.5
  assert '--config.weight.sparsity=0.5' in lines[1]['command']
  assert command('--pack=4').out == 'TABLE of 5\n'  # nothing is left to train
  assert len(fake.file.read_text().splitlines()) == 5


def test_a_run_that_diverges_has_its_line_and_the_others_theirs(study, command):
  fake = study(*THREE[:2], {'seed': 3, 'optimizer.learning_rate': 1e30})
  assert command('--pack=3').code == 0
  lines = results.read_file(fake.file)
  assert [line.get('failed') for line in lines] == [None, None, 'diverged']
  assert 'config.optimizer.learning_rate than 1e+30' in lines[2]['message']


def test_a_run_that_another_process_trains_is_left_out_of_its_pack(study, command):
  fake = study(*THREE)
  held = list(fake.runs)[1]
  fake.workdir(held).mkdir(parents=True)
  with lock.held(fake.workdir(held) / 'study.lock', 'a test'):
    shown = command('--pack=3')
  assert shown.code == 0 and 'skipped 1 of 3 runs' in shown.err
  lines = results.read_file(fake.file)
  assert [line['metrics']['packed_runs'] for line in lines] == [2, 2]


def test_a_pack_that_does_not_fit_names_the_number_that_does(study, command, monkeypatch):
  fake = study(*THREE)
  pack = Pack.of([setup(configs.load(run.config, run.overrides)) for run in fake.runs.values()])
  need = pack.bytes()
  monkeypatch.setattr(runtime, 'memory', lambda: need - 1)
  shown = command('--pack=3')
  assert shown.code == 2 and shown.err.endswith('valid: --pack=2\n')
  assert shown.err.startswith('error: --pack=3: 3 runs such as number0-seed0-')
  assert not fake.file.exists()
  # Where as many as fit are asked for, there are two packs.
  monkeypatch.setattr(packing.jax, 'default_backend', lambda: 'gpu')
  jobs = packing.plan(fake.runs, fake.configs(fake.runs), packing.AUTO)
  assert [job.title for job in jobs] == [
    'alone: all packs of this program are full',
    'a pack of 2 runs',
  ]
  monkeypatch.setattr(packing.packs, 'fitting', lambda pack: 1)
  titles = {job.title for job in packing.plan(fake.runs, fake.configs(fake.runs), packing.AUTO)}
  assert titles == {'alone: no two runs of this program fit the memory together'}


def test_an_error_in_one_folder_of_a_pack_names_its_run(study, command):
  fake = study(*THREE)
  bad = list(fake.runs)[1]
  fake.workdir(bad).mkdir(parents=True)
  (fake.workdir(bad) / 'config.json').write_text('{')
  shown = command('--pack=3')
  assert shown.code == 2 and shown.err.count('error: ') == 1
  assert f'error: a pack of 3 runs: run {bad}: ' in shown.err


def test_runs_that_cannot_be_packed_are_refused_in_one_line(study, command):
  study({'seed': 0}, {'model.width': 32})
  shown = command('--pack=2')
  assert shown.code == 2 and shown.err.count('\n') == 1
  assert 'they differ in config.model.width (16 and 32)' in shown.err
  assert shown.err.startswith('error: --pack=2: no two of the missing runs can be packed, such as ')
  assert command('--pack=1').code == 2


def test_without_a_number_nothing_is_packed_on_a_cpu(study, command):
  fake = study(*THREE)
  shown = command('--dry_run', '--pack')
  assert shown.out.count('# alone: the device is a CPU') == 3
  assert '--pack=N packs them on a CPU too' in shown.err
  assert len(packing.plan(fake.runs, fake.configs(fake.runs), 2)) == 2
  study({'seed': 0}, {'data.path': 'nowhere'})
  shown = command('--dry_run', '--pack')
  assert shown.code == 2 and 'error: run number1-' in shown.err


def test_the_sweep_plans_six_methods_at_three_sparsities_over_three_seeds():
  runs = packed_sweep.runs()
  sparse = [run for run in runs if run.labels['method'] != 'dense']
  assert len(sparse) == 6 * 3 * 3 and len(runs) == len(sparse) + 3
  assert len({run.id('x') for run in runs}) == len(runs)


@pytest.mark.slow
def test_a_packed_study_ends_in_a_table_and_a_figure(tmp_path, monkeypatch):
  runs = {run.id('smoke'): run for run in packed_smoke.runs()}
  study = Study('smoke', packed_smoke, tmp_path / 'smoke', runs)
  study.train(runs, pack=4)
  shown = study.report()
  assert shown.count('Top-KAST') == 2 and '±' in shown
  assert (tmp_path / 'smoke' / 'smoke.png').exists()
