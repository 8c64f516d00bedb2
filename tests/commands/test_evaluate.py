"""`sparse_lm.evaluate`: the numbers of evaluations that are named, of trained and packed models."""

import contextlib
import hashlib
import json
import math

import numpy as np
import pytest

import sparse_lm.evaluate as evaluate_command
from sparse_lm import evals
from sparse_lm.inference.workload import DECODED
from sparse_lm.measure import energy
from sparse_lm.pack import pack
from sparse_lm.runs.loop import train
from sparse_lm.runs.setup import data_of
from sparse_lm.runs.trained import load

CONTEXT = 32


@pytest.fixture(scope='module')
def run(tiny_config, tmp_path_factory, packed_by_bytes):
  """Config, workdir and packed folder of a run, and the numbers of its result.json."""
  folder = tmp_path_factory.mktemp('evaluated')
  config = tiny_config(
    data__context=CONTEXT, activation__name='relu', weight__name='static', weight__sparsity=0.5
  )
  metrics = train(config, str(folder / 'run'), progress=False)['metrics']
  pack(str(folder / 'run'), str(folder / 'packed'))
  return config, folder / 'run', folder / 'packed', metrics


@pytest.fixture
def meter(monkeypatch):
  """A meter that reads 100 joules."""

  @contextlib.contextmanager
  def read():
    measured = energy.Measured()
    yield measured
    measured.joules = 100.0

  monkeypatch.setattr(energy, 'meter', read)


def loss(config, workdir, split):
  """Mean nats per token over windows of a context, by a softmax in NumPy."""
  return mean(data_of(config).tokens[split], load(str(workdir)), CONTEXT)


def mean(tokens, trained, context):
  """The same of 1-D tokens."""
  found = []
  for begin in range(0, len(tokens) - 1, context):
    window = tokens[begin : begin + context + 1].astype(np.int32)
    logits = np.asarray(trained.logits(window[None, :-1])[0], np.float64)
    found.extend(np.log(np.exp(logits).sum(axis=-1)) - logits[range(len(window) - 1), window[1:]])
  return np.mean(found)


@pytest.mark.parametrize('split', ['validation', 'test'])
@pytest.mark.parametrize('packed', [False, True])
def test_the_loss_is_that_of_numpy_and_of_the_training_run(call, run, packed, split):
  config, *folders, metrics = run
  given = [f'--workdir={folders[packed]}', '--task=loss', f'--split={split}', '--json']
  code, out, err = call(evaluate_command, given)
  assert code == 0 and not err
  found = json.loads(out)
  name = {'validation': 'val', 'test': 'test'}[split]
  values = found['values']['loss']
  assert values[f'{name}_loss'] == pytest.approx(loss(config, folders[0], split), rel=1e-5)
  ratio = data_of(config).card['bytes_per_token'][split]
  bits = values[f'{name}_loss'] / math.log(2) / ratio
  assert values[f'{name}_bits_per_byte'] == pytest.approx(bits)
  assert found['split'] == split and str(folders[packed]) in found['source']
  if split == 'validation':
    for printed in ('val_loss', 'val_bits_per_byte'):
      assert values[printed] == pytest.approx(metrics[printed], rel=1e-5 if packed else 1e-7)


@pytest.mark.parametrize('packed', [False, True])
def test_another_text_in_other_windows(call, run, packed, tmp_path):
  """The whole text is the test split; its first tokens are read, in shorter windows."""
  _, *folders, _ = run
  text = 'the dog runs\nover a tree\n' * 9
  (tmp_path / 'other.txt').write_text(text)
  given = [f'--workdir={folders[packed]}', '--task=loss', '--split=test', '--context=20', '--json']
  given += ['--max_tokens=101', '--batch=3', f'--config.data.path={tmp_path}/other.txt']
  code, out, err = call(evaluate_command, [*given, '--config.data.split=0,0,1'])
  assert code == 0 and not err
  found = json.loads(out)
  values, card = found['values']['loss'], found['cards']['loss']
  trained = load(str(folders[0]))
  want = mean(trained.tokenizer.encode(text[:101]), trained, 20)
  assert values['test_loss'] == pytest.approx(want, rel=1e-5)
  assert values['perplexity'] == pytest.approx(math.exp(want), rel=1e-4)
  assert values['test_bits_per_byte'] == pytest.approx(want / math.log(2), rel=1e-5)
  words = len(text[:101].split()) + text[:101].count('\n')
  assert values['word_perplexity'] == pytest.approx(math.exp(want * 101 / words), rel=1e-4)
  statistics = {name for name in values if name.startswith('test/')}
  assert card.pop('unit').keys() == values.keys() - statistics
  assert card == {
    'split': 'test',
    'data_sha256': hashlib.sha256(text.encode()).hexdigest(),
    'context': 20,
    'stride': 20,
    'tokens': 101,
    'predictions': 100,
    'tokenizer': 'chars',
    'tokenizer_sha256': trained.tokenizer.digest,
  }


@pytest.mark.parametrize('packed', [False, True])
def test_evaluations_that_accept_the_model_are_printed(call, run, meter, packed):
  """By default; of a model that is not packed, no speed beside its twin is measured."""
  code, out, err = call(evaluate_command, [f'--workdir={run[1 + packed]}', '--batch=2'])
  assert code == 0
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines()]
  values = {(row[0], row[1]): row[2] for row in rows[2:] if row}
  # The meter was read over 15 turns of two sequences.
  assert values['energy', 'joules_per_token'] == f'{100 / (15 * 2 * DECODED):.6g}'
  assert float(values['loss', 'val_loss']) == pytest.approx(run[3]['val_loss'], rel=1e-5)
  assert out.splitlines()[-1].endswith('; validation split')
  reads = {name for name in evals.names() if evals.evaluation(name).reads_text}
  assert reads == {'loss', 'speed', 'energy'}  # what needs no text runs if --task names it
  left_out = reads - {task for task, _ in values}
  assert {line.split(' (')[0] for line in err.splitlines()} == {f'left out: {x}' for x in left_out}
  if packed:
    assert not left_out
    assert values['speed', 'read_bytes'] == '-'  # two sequences share what they read
  else:
    assert left_out == {'speed'} and 'valid: a packed model' in err


def test_minimal_pairs_need_no_text(call, run, tmp_path):
  """The text of training may be gone; options are arguments of the command."""
  pairs = [
    {'task': 't', 'field': 'f', 'good': 'the dog', 'bad': bad} for bad in ('the the', 'gggg')
  ]
  file = tmp_path / 'pairs.jsonl'
  file.write_text('\n'.join(map(json.dumps, pairs)))
  given = [f'--workdir={run[1]}', '--task=blimp', f'--pairs_file={file}', '--pairs=1']
  code, out, err = call(evaluate_command, given)
  assert code == 0 and not err
  assert '| blimp  | blimp/f/t |' in out and 'pairs 1, tasks 1' in out


BAD = {
  'task': (['--task=los'], "unknown evaluation 'los': did you mean 'loss'"),
  'no task': (['--task='], "unknown evaluation ''"),
  'split': (['--split=valid'], "unknown --split 'valid': did you mean 'validation'"),
  'not packed': (['--task=loss,speed'], 'valid: a packed model'),
  'too little text': (['--task=energy', '--batch=1000'], '--batch=1000'),
  'workdir': (['--workdir=no/such/folder'], 'no/such/folder'),
  'batch': (['--batch=0'], '--batch'),
  'context': (
    ['--context=33'],
    'context=33 is not valid; valid: 1 to 32, the positions of the model',
  ),
  'stride': (['--context=8', '--stride=9'], 'stride=9 is not valid; valid: 1 to 8, the context'),
  'whose option': (
    ['--task=loss', '--pairs=2'],
    '--pairs=2 is an option of blimp; valid: --task=blimp',
  ),
  'no pairs': (['--task=blimp'], "--pairs_file='' names no file"),
  'no prediction': (['--max_tokens=1'], '--max_tokens'),
  'no file': (['--config.data.path=no/such.txt'], "config.data.path 'no/such.txt' matches no file"),
  'not text': (
    ['--config.data.tokenizer=bytes'],
    "'config.data.tokenizer': did you mean 'config.data.source'?",
  ),
  'characters': (['--config.data.path=README.md'], 'has no token for'),
  'argument': (['--tasks=loss'], "did you mean '--task'"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_line(case, call, run):
  given, expected = BAD[case]
  code, out, err = call(evaluate_command, [f'--workdir={run[1]}', *given])
  assert code == 2 and not out
  assert err.startswith('error: ') and err.count('\n') == 1 and expected in err, err


def test_a_table_has_one_row_for_a_number_of_every_layer():
  values = {'val/block_0/mlp/active': 0.25, 'val_loss': 2.0, 'val/block_11/mlp/active': 0.75}
  lines = evaluate_command.table({'loss': values}).splitlines()[2:]
  assert [[cell.strip() for cell in line.split('|')[2:-1]] for line in lines] == [
    ['val/block_*/mlp/active', '0.5 (mean of 2)'],
    ['val_loss', '2'],
  ]


def test_a_workdir_is_needed(call):
  code, _, err = call(evaluate_command, [])
  assert code == 2 and '--workdir' in err


@pytest.mark.parametrize('packed', [False, True])
def test_another_text_is_refused(packed, call, run, monkeypatch, text_file, tmp_path):
  """The config names a path, and what lies there may have changed since."""
  from sparse_lm.runs import runnable

  other = tmp_path / 'other.txt'
  other.write_text(text_file.read_text().replace('river', 'RIVER'))
  config = run[0].copy_and_resolve_references().unlock()
  config.data.path = str(other)
  changed = data_of(config.lock())
  monkeypatch.setattr(runnable, 'data_of', lambda *_: changed)
  code, _, err = call(evaluate_command, [f'--workdir={run[1 + packed]}', '--task=loss'])
  assert code == 2 and f'--workdir={run[1 + packed]}' in err and err.count('\n') == 1
