"""The studies that measure a machine: what they plan, what a row holds, and what their page says."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import (
  accelerator,
  accelerator_all,
  accelerator_goals,
  accelerator_quick,
  accelerator_report,
  documents,
  twin_process,
)
from experiments.accelerator_bench import Bench, execute
from experiments.compiling import Together
from experiments.sweep import Run
from experiments.twin_process import NoTwin, Twin
from sparse_lm.core.errors import UserError
from sparse_lm.report import plot, results
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.build import build

STUDIES = (accelerator, accelerator_all, accelerator_quick)
GPU = {'device': 'NVIDIA H100 80GB HBM3', 'jax': '0.11.2'}
CPU = {'device': 'cpu', 'cores': 2, 'cpu': 'A CPU', 'instruction_set': 'AVX2', 'jax': '0.10.2'}


def line(row, metrics, env=GPU, **more):
  return {'run': row, 'labels': {'row': row}, 'seed': 0, 'env': env, 'metrics': metrics} | more


def step(ms, ratio, **more):
  found = {'step_ms': ms, 'step_ms_low': ms - 0.1, 'step_ms_high': ms + 0.1, 'seconds': 2.0}
  found |= {'ratio': ratio, 'ratio_low': ratio - 0.01, 'ratio_high': ratio + 0.01}
  return found | {'reference_ms': ms / ratio} | more


def test_every_study_plans_runs_that_load_and_each_row_once():
  for study in STUDIES:
    runs = study.runs()
    rows = [run.labels['row'] for run in runs]
    assert len({run.id('x') for run in runs}) == len(set(rows)) == len(rows) > 8
    for run in runs:
      configs.load(run.config, run.overrides)


@pytest.mark.slow
def test_every_budget_can_be_reached_at_the_size_of_the_study():
  runs = [run for run in accelerator_all.runs() if run.config.startswith('configs/')]
  loaded = {run.labels['row']: configs.load(run.config, run.overrides) for run in runs}
  held = {row: config for row, config in loaded.items() if config.budget.target < 1}
  assert {'hybrid', 'l0', 'token_gate'} <= set(held)
  for config in held.values():
    config.model.precision = 'float32'
    build(config, accelerator_all.BENCH.vocab)


def test_a_refused_config_fails_in_its_own_row_alone(tmp_path):
  bench = Bench('configs/tiny.py', {}, 64, 1, 1, 8, 8)
  bench.step_run('refused', {'budget.target': 0.1})
  bench.step_run('static', {'weight.name': 'static'})
  bench.lower(tmp_path / 'study' / 'runs' / 'static')
  assert ('static', 'update') not in bench.programs
  bench.programs.take(('static', 'step'))
  with pytest.raises(UserError, match=r'config\.budget\.target=0\.1'):
    bench.programs.take(('refused', 'step'))


def test_every_goal_is_of_a_row_that_its_study_measures():
  planned = {
    study.__name__.rpartition('.')[2]: {run.labels['row'] for run in study.runs()}
    for study in STUDIES
  }
  every = (*accelerator_goals.GPU, *accelerator_goals.CPU)
  assert [goal.row for goal in every if goal.row not in planned[goal.study]] == []


def test_what_matters_most_is_measured_first():
  first = [run.labels['row'] for run in accelerator.runs()][:3]
  assert first == [accelerator_goals.PEAK, accelerator_goals.DENSE, accelerator_goals.STE]


@pytest.fixture(scope='module')
def tiny():
  size = {'data.batch': 2, 'data.context': 8, 'model.layers': 1, 'model.width': 16}
  size |= {'model.hidden': 16, 'model.heads': 2, 'model.kv_heads': 2}
  return Bench('configs/base.py', size, 16, 2, 3, 32, 4096)


@pytest.fixture
def quiet(monkeypatch):
  """What an entry point sets is left alone, and no PyTorch is found."""
  monkeypatch.setattr(runtime, 'prepare', lambda: None)
  monkeypatch.setattr(twin_process.importlib.util, 'find_spec', lambda name: None)


def test_a_row_holds_a_step_beside_the_dense_one(tiny, quiet, tmp_path):
  overrides = {'weight.name': 'rigl', 'weight.sparsity': 0.5}
  run = tiny.step_run('RigL', overrides)
  found = run.execute(run, tmp_path)
  assert 'failed' not in found, found['message']
  recorded = found['config']
  assert recorded['model']['width'] == 16 and recorded['weight']['name'] == 'rigl'
  assert recorded['model']['precision'] == 'float32'
  metrics = found['metrics']
  assert metrics['ratio_low'] <= metrics['ratio'] <= metrics['ratio_high']
  assert 0 < metrics['step_ms_low'] <= metrics['step_ms'] <= metrics['step_ms_high']
  assert metrics['updates_per_step'] == 0.01 and metrics['update_ms'] > 0
  assert metrics['peak_memory'] > 0
  # Three times a forward pass of 4 attention matrices, 2 of the MLP and the head, and of all pairs.
  per_token = 3 * 2 * (4 * 16 * 16 + 2 * 16 * 16 + 16 * 16 + 2 * 8 * 16)
  assert metrics['flops_per_s'] == pytest.approx(per_token * metrics['tokens_per_second'])
  json.dumps(found, allow_nan=False)


def test_the_dense_step_is_measured_without_pytorch_too(tiny, quiet, tmp_path, capsys):
  run = tiny.run('dense', tiny.dense_step)
  metrics = run.execute(run, tmp_path)['metrics']
  assert metrics['reference'] == 'not measured: PyTorch is not installed'
  assert metrics['step_ms'] > 0 and 'ratio' not in metrics
  assert capsys.readouterr().out.startswith('dense: reference not measured: PyTorch')


def test_programs_are_compiled_together_and_equal_ones_once(monkeypatch):
  programs, compiled = Together(), []

  def lowered(factor):
    found = jax.jit(lambda x: factor * x).lower(jnp.ones(2))
    compile_ = found.compile
    monkeypatch.setattr(found, 'compile', lambda: compiled.append(factor) or compile_())
    return found

  for name, factor in (('a', 2), ('b', 3), ('c', 2)):
    programs.lower(name, lambda factor=factor: lowered(factor))
  programs.lower('d', lambda: 1 / 0)
  assert programs.take('b')(jnp.ones(2)).tolist() == [3, 3]
  assert programs.take('c') is programs.take('a') and sorted(compiled) == [2, 3]
  for _ in range(2):  # each row that needs it hears why it failed
    with pytest.raises(ZeroDivisionError):
      programs.take('d')
  programs.lower('b', lambda: lowered(3))  # it was taken: nothing is traced again
  assert 'b' not in programs._lowered


def test_a_row_that_fails_is_a_line_too(quiet, tmp_path, capsys):
  def measure(run, workdir):
    raise RuntimeError('RESOURCE_EXHAUSTED:\n  out of memory')

  found = execute(measure, Run('configs/tiny.py', {}, {'row': 'STE'}), tmp_path)
  assert found['message'] == 'RuntimeError: RESOURCE_EXHAUSTED: out of memory'
  assert capsys.readouterr().out == f'STE: not measured: {found["message"]}\n'
  results.append(tmp_path / 'runs.jsonl', line('STE', **found) | {'seed': 0})
  (read,) = results.read_file(tmp_path / 'runs.jsonl')
  assert f'STE was not measured: {found["message"]}.' in accelerator_report.page([read], tmp_path)


def test_a_twin_that_ends_says_why(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'executable', 'false')
  twin = Twin({'layers': 1}, 2, tmp_path / 'errors')
  with pytest.raises(NoTwin, match='torch_twin ended'):
    twin.read()
  twin.process.wait()


@pytest.fixture
def lines():
  """Of a GPU that meets a goal and misses another, and of a CPU."""
  return [
    line(
      accelerator_goals.PEAK, {'bfloat16_per_s': 7e14, 'float32_per_s': 4e14, 'memory_per_s': 2e12}
    ),
    line(accelerator_goals.DENSE, step(33.0, 0.99, peak_memory=9.5e9, reference='torch 2.11')),
    line(accelerator_goals.STE, step(40.0, 1.21)),
    line(accelerator_goals.START, {'cold_s': 20.0, 'warm_s': 7.0, 'peak_memory': 9e9}),
    line(accelerator_goals.DENSE, step(600.0, 1.02), env=CPU),
  ]


def test_the_page_holds_machines_against_the_goals_side_by_side(lines, tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(plot, 'save', lambda figure, folder, name: drawn.setdefault(name, figure))
  text = accelerator_report.page(lines, tmp_path / 'accelerator')
  cells = {
    row[1].strip(): [cell.strip() for cell in row[2:-1]]
    for row in (shown.split('|') for shown in text.splitlines() if '|' in shown)
  }
  assert cells['dense: step / step of the torch.compile twin, at most 1.15 ×'][0] == '0.99 ×, met'
  assert cells['STE: step / dense step, at most 1.10 ×'][0] == '1.21 ×, missed'
  assert cells['first step, filled cache of compiled programs, at most 6.0 s'][0] == '7.0 s, missed'
  assert cells['RigL: step / dense step, at most 1.03 ×'][0] == 'not measured'
  assert '700 TFLOP/s in bfloat16' in text and '2,000 GB/s' in text
  assert text.count('**') == 4 and '**2 cores of A CPU, AVX2, jax 0.10.2**' in text
  (axes,) = drawn['accelerator'].axes
  assert [tick.get_text() for tick in axes.get_yticklabels()] == ['dense', 'STE']
  goals = [own for own in axes.lines if own.get_marker() == '|' and own.get_markeredgewidth() > 1.5]
  assert list(goals[0].get_xydata().ravel()) == [1.15, 0.0, 1.10, 1.0]


def test_lines_of_each_device_are_kept_beside_each_other(lines, tmp_path, monkeypatch):
  monkeypatch.setattr(documents, 'LINES', tmp_path / 'lines')
  monkeypatch.setattr(plot, 'save', lambda *_: [])
  planned = {run.labels['row']: run.id('accelerator') for run in accelerator.runs()}
  for name, env in (('gpu', GPU), ('cpu', CPU)):
    for found in lines:
      if found['env'] == env:
        more = {'run': planned[found['labels']['row']], 'command': 'x', 'study': 'accelerator'}
        results.append(tmp_path / name / 'accelerator' / 'runs.jsonl', found | more)
    documents.take('accelerator', str(tmp_path / name))
  files = [file.name for file in (tmp_path / 'lines').iterdir()]
  assert sorted(files) == ['accelerator-cpu-avx2.jsonl', 'accelerator-nvidia-h100-80gb-hbm3.jsonl']
  assert documents.machines(tmp_path, 'accelerator').count('met') >= 2
  assert documents.machines(tmp_path, 'accelerator_all') == 'Not measured yet.'


def test_a_study_that_two_devices_made_is_kept_in_two_sets(lines, tmp_path, monkeypatch):
  monkeypatch.setattr(documents, 'LINES', tmp_path / 'lines')
  planned = {run.labels['row']: run.id('accelerator') for run in accelerator.runs()}
  for found in (lines[0], lines[4]):  # a GPU's, then a CPU's
    more = {'run': planned[found['labels']['row']], 'command': 'x', 'study': 'accelerator'}
    results.append(tmp_path / 'accelerator' / 'runs.jsonl', found | more)
  documents.take('accelerator', str(tmp_path))
  for file, env in (('accelerator-nvidia-h100-80gb-hbm3', GPU), ('accelerator-cpu-avx2', CPU)):
    (kept,) = results.read_file(tmp_path / 'lines' / f'{file}.jsonl')
    assert kept['env'] == env


def test_a_study_in_a_process_of_its_own_takes_the_memory_that_it_needs(tmp_path, monkeypatch):
  def ran(command, env, **_):
    assert env['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false' and env.keys() > os.environ.keys()
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(subprocess, 'run', ran)
  monkeypatch.delenv('XLA_PYTHON_CLIENT_PREALLOCATE', raising=False)
  assert accelerator_all._study(accelerator_all.runs()[1], tmp_path)['runs'] > 1


@pytest.mark.slow
def test_first_steps_run_in_processes_of_their_own(tiny, tmp_path):
  run = tiny.run('first step', tiny.first_step)
  metrics = tiny.first_step(run, tmp_path)
  assert min(metrics['cold_s'], metrics['warm_s']) > 0


@pytest.mark.slow
def test_packed_runs_are_measured_beside_one(tiny, tmp_path):
  metrics = tiny.packed(3, tiny.run('packed', tiny.step), tmp_path)
  assert metrics['runs'] == 3 and metrics['ratio'] > 0
