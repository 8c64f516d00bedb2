"""The command line: bad input is one line and exit code 2; signals save; damage is named."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import sparse_lm.cost as cost_command
import sparse_lm.train.__main__ as train_command
from sparse_lm.runs.trained import load

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def small(text_file, tiny_config):
  """Arguments of a run of seconds: what `tiny_config` sets."""
  config = tiny_config()
  fields = {
    **{f'data.{k}': config.data[k] for k in ('source', 'tokenizer', 'context', 'batch', 'path')},
    **{f'model.{k}': config.model[k] for k in ('layers', 'width', 'hidden', 'heads', 'kv_heads')},
    **{f'train.{k}': config.train[k] for k in ('steps', 'log_every', 'checkpoint_every')},
  }
  return {f'config.{name}': value for name, value in fields.items()}


def arguments(small, workdir, **given):
  config = {'config': 'configs/tiny.py', 'workdir': workdir}
  return [f'--{name}={value}' for name, value in {**config, **small, **given}.items()]


BAD = {
  'unknown field': ({'config.optimizer.lerning_rate': 1}, 'config.optimizer.learning_rate'),
  'unknown group': ({'config.optimiser.name': 'adamw'}, 'config.optimizer.name'),
  'field of another method': ({'config.weight.period': 5}, 'config.weight.period'),
  'unknown method': ({'config.weight.name': 'ragl'}, "'rigl'"),
  'unknown activation': ({'config.activation.name': 'relu3'}, "'relu"),
  'unknown config file': ({'config': 'configs/tinny.py'}, 'configs/tiny.py'),
  'unknown argument': ({'wrokdir': 'x'}, '--wrokdir'),
  'wrong type': ({'config.train.steps': 'many'}, 'config.train.steps'),
  'sparsity 1': ({'config.weight.name': 'set', 'config.weight.sparsity': 1.0}, '[0, 1)'),
  'sparsity below 0': ({'config.weight.name': 'set', 'config.weight.sparsity': -0.1}, '[0, 1)'),
  'sparsity without a method': ({'config.weight.sparsity': 0.5}, 'rigl'),
  'heads': ({'config.model.heads': 3}, '1, 2, 4, 8, 16'),
  'kv_heads': ({'config.model.kv_heads': 3}, 'config.model.kv_heads'),
  'missing corpus': ({'config.data.path': 'no/such/file.txt'}, 'no/such/file.txt'),
  'no path': ({'config.data.path': ''}, 'config.data.path'),
  'unknown tokenizer': ({'config.data.tokenizer': 'byte'}, "'bytes'"),
  'vocab_size': ({'config.data.tokenizer': 'bpe', 'config.data.vocab_size': 256}, '257'),
  'not prepared': (
    {'config.data.source': 'tfds', 'config.data.path': 'configs'},
    'dataset_info.json',
  ),
  'no mixture': ({'config.data.source': 'mixture', 'config.data.path': ''}, 'stdlib=0.5'),
  'weight of a component': (
    {'config.data.source': 'mixture', 'config.data.path': 'stdlib=half'},
    "'stdlib=half'",
  ),
  'too short a corpus': ({'config.data.context': 100_000}, 'config.data.context'),
  'optimizer with a mask': (
    {'config.weight.name': 'set', 'config.weight.sparsity': 0.5, 'config.optimizer.name': 'sm3'},
    'adamw',
  ),
  'unknown optimizer': ({'config.optimizer.name': 'adam'}, "did you mean '"),
  'pattern': ({'config.weight.name': 'set', 'config.weight.pattern': 'unstruct'}, "'unstructured'"),
  'rescale': ({'config.weight.name': 'static', 'config.weight.rescale': 'units'}, "'unit'"),
  'period': ({'config.weight.name': 'rigl', 'config.weight.period': 0}, 'config.weight.period'),
  'budget': ({'config.weight.name': 'set', 'config.weight.distribution': 'erq'}, 'erk'),
  'budget expression': (
    {'config.weight.name': 'set', 'config.weight.distribution': '(=0.5'},
    'config.weight.distribution',
  ),
  'dense expression': ({'config.weight.name': 'set', 'config.weight.dense': "('(',)"}, 'dense'),
  'nothing to prune': ({'config.weight.name': 'set', 'config.weight.dense': "('.',)"}, 'dense'),
  'layers': ({'config.mlp.layers': '5:'}, 'config.mlp.layers'),
  'unknown fallback': ({'config.attention.fallback.name': 'ful'}, "'full'"),
  'field of fallback': ({'config.attention.fallback.window': 8}, 'config.attention.fallback'),
  'capacity': (
    {'config.depth.name': 'mixture_of_depths', 'config.depth.capacity': 0.001},
    'config.depth.capacity',
  ),
  'slots of an expert': (
    {'config.mlp.name': 'moe_topk', 'config.mlp.capacity': 0.01},
    'config.mlp.capacity',
  ),
  'k above the experts': (
    {'config.mlp.name': 'moe_topk', 'config.mlp.k': 9},
    '1 to the number of experts, 8',
  ),
  'k above the keys': (
    {'config.attention.name': 'topk_keys', 'config.attention.k': 17},
    '1 to config.data.context, 16',
  ),
  'density': ({'config.activation.name': 'topk', 'config.activation.density': 1.5}, '(0, 1]'),
  'estimator': (
    {'config.depth.name': 'token_gate', 'config.depth.estimator': 'straight'},
    "'straight_through'",
  ),
  'estimator beside a router': (
    {
      'config.depth.name': 'token_gate',
      'config.depth.estimator': 'reinforce',
      'config.mlp.name': 'expert_choice',
    },
    'not causal in training',
  ),
  'target': ({'config.depth.name': 'token_gate', 'config.budget.target': 1.5}, '(0, 1]'),
  'target without a gate': ({'config.budget.target': 0.5}, 'token_gate'),
  'target below the floor': (
    {'config.attention.name': 'head_gate', 'config.budget.target': 0.2},
    'block_0/mlp/up',
  ),
  'controller': ({'config.budget.controller': 'duel'}, "'dual'"),
  'steps': ({'config.train.steps': 0}, 'config.train.steps'),
  'accumulation': ({'config.train.accumulation': 3}, 'config.train.accumulation'),
  'seed below 0': ({'config.seed': -1}, 'config.seed'),
  'seed beyond int32': ({'config.seed': 2**33}, 'config.seed'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, call, small, tmp_path):
  given, expected = BAD[case]
  code, out, err = call(train_command, arguments(small, tmp_path / 'run', **given))
  assert code == 2 and not out
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert expected in err
  assert not list(tmp_path.iterdir()), 'a workdir was made'


def test_empty_corpus_and_workdir_that_is_no_folder(call, small, tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  empty = {'config.data.path': tmp_path / 'empty.txt'}
  below = arguments(small, tmp_path / 'empty.txt' / 'run')
  for given in (
    arguments(small, tmp_path / 'run', **empty),
    arguments(small, tmp_path / 'empty.txt'),
    below,
  ):
    code, _, err = call(train_command, given)
    assert code == 2 and err.count('\n') == 1 and 'empty.txt' in err, err
  assert [path.name for path in tmp_path.iterdir()] == ['empty.txt']


def test_workdir_of_another_config(call, small, tmp_path):
  assert call(train_command, arguments(small, tmp_path))[0] == 0
  before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
  code, _, err = call(train_command, arguments(small, tmp_path, **{'config.seed': 3}))
  assert code == 2 and err.count('\n') == 1 and 'config.seed=0' in err and '3' in err
  assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before


@pytest.mark.parametrize('command', ['sparse_lm.train', 'sparse_lm.cost'])
def test_bad_input_is_one_line_of_a_process(command, small, tmp_path):
  workdir = tmp_path / 'run'
  given = arguments(small, workdir, **{'config.weight.sparsty': 0.5})
  given = [a for a in given if command != 'sparse_lm.cost' or not a.startswith('--workdir')]
  done = subprocess.run(
    [sys.executable, '-m', command, *given], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.count('\n') == 1 and 'config.weight.sparsity' in done.stderr
  assert not workdir.exists()


def test_a_rate_beyond_float32_is_refused(call, small, tmp_path):
  given = {'config.optimizer.learning_rate': '1e39'}
  code, _, err = call(train_command, arguments(small, tmp_path / 'run', **given))
  assert (
    code == 2 and 'config.optimizer.learning_rate=1e+39 is not valid' in err and 'float32' in err
  )
  assert not (tmp_path / 'run').exists()


def test_diverged_run_stops_and_keeps_what_is_good(call, small, tmp_path):
  given = {'config.optimizer.learning_rate': '1e30', 'config.train.checkpoint_every': 1}
  code, out, err = call(train_command, arguments(small, tmp_path / 'run', **given))
  assert code == 2 and not out
  assert 'Traceback' not in err
  line = err.strip().splitlines()[-1]
  assert ' is nan at step ' in line and 'learning_rate' in line
  step = int(line.split(' at step ')[1].split(';')[0])
  saved = sorted(int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir())
  assert not saved or (saved[-1] < step and f'checkpoint {saved[-1]}' in line)
  assert not (tmp_path / 'run' / 'result.json').exists()
  # "last good" is to be good: a state that gives NaN in the next step is not one to continue from.
  for leaf in jax.tree.leaves(load(str(tmp_path / 'run')).params) if saved else []:
    assert np.isfinite(leaf).all()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(small, tmp_path):
  given = {'config.train.steps': 1_000_000, 'config.train.log_every': 10}
  command = [sys.executable, '-m', 'sparse_lm.train', *arguments(small, tmp_path, **given)]
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  log, deadline = tmp_path / 'metrics.jsonl', time.monotonic() + 120
  while not log.exists() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, err
  assert 'Traceback' not in err and 'saved' in err
  (step,) = (int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert step >= 10
  command = [part.replace('=1000000', f'={step + 20}') for part in command]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert f'after {step + 20} steps' in done.stdout and 'validation loss' in done.stdout
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['metrics']['steps'] == step + 20
  logged = [json.loads(line) for line in log.read_text().splitlines()]
  steps = [line['step'] for line in logged if 'loss' in line]
  assert steps == sorted(set(steps)) and steps[-1] == step + 20


def test_cost_prints_without_training(call, small, tmp_path, monkeypatch):
  monkeypatch.setattr(
    'sparse_lm.train.step.Program.step', lambda *_: pytest.fail('cost took a step')
  )
  given = {'config.weight.name': 'rigl', 'config.weight.sparsity': 0.75}
  given = [a for a in arguments(small, '', **given) if not a.startswith('--workdir')]
  code, out, err = call(cost_command, given)
  assert code == 0 and not err
  rows = {
    row.split('|')[1].strip(): row.split('|')[2].strip() for row in out.splitlines() if '|' in row
  }
  assert rows['sparsity of prunable weights'] == '75.00%'
  # 4 attention matrices of 16 × 16 and 2 of 16 × 32, at 2 FLOPs a weight.
  assert float(rows['block_0/mlp/up/linear'].replace(',', '')) == 2 * 16 * 32
  assert float(rows['block_0/attention/query/linear'].replace(',', '')) == 2 * 16 * 16


def test_cost_says_what_a_budget_changes(call, small):
  gates = {'config.depth.name': 'token_gate', 'config.budget.target': 0.7}
  given = [a for a in arguments(small, '', **gates) if not a.startswith('--workdir')]
  code, out, _ = call(cost_command, given)
  rows = [[cell.strip() for cell in row.split('|')] for row in out.splitlines() if '|' in row]
  found = {row[1]: row[2:4] for row in rows}
  last = out.splitlines()[-1]
  dense = float(found['forward FLOPs per token'][1].replace(',', ''))
  assert code == 0 and last.startswith('config.budget.target=0.7:')
  assert f'{0.7 * dense:,.0f} per token' in last
  assert f'at {found["forward FLOPs / dense twin"][0]} of' in last
