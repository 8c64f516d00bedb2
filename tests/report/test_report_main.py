import json
import sys

import pytest

from sparse_lm.report.__main__ import main
from sparse_lm.runs.workdir import write_json


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'runs.jsonl'
  losses = {('dense', 0.0): (1.0, 1.2), ('rigl', 0.9): (1.5, 1.9)}
  with path.open('w') as stream:
    for (method, sparsity), values in losses.items():
      for seed, loss in enumerate(values):
        run = {'study': 'demo', 'run': f'{method}{seed}', 'seed': seed}
        run['labels'] = {'method': method, 'sparsity': sparsity}
        run['metrics'] = {'val_loss': loss, 'stored_bytes': 2000}
        stream.write(json.dumps(run) + '\n')
  return path


def report(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, 'argv', ['report', *map(str, arguments)])
  try:
    main()
  except SystemExit as stop:
    return stop.code, *capsys.readouterr()
  return 0, *capsys.readouterr()


def test_markdown(monkeypatch, capsys, file):
  arguments = (file, '--rows=method', '--columns=val_loss,stored_bytes', '--baseline=method=dense')
  code, out, _ = report(monkeypatch, capsys, *arguments)
  assert code == 0
  row = next(row for row in out.splitlines() if row.startswith('| RigL'))
  cells = [cell.strip() for cell in row.strip('|').split('|')]
  assert cells == ['RigL', '2', '1.7000 ± 0.2828', '+0.6000 [-0.6706, +1.8706]', '2.0']
  assert '--columns=val_loss,stored_bytes --baseline=method=dense`' in out


def test_an_equivalence_test_against_a_margin(monkeypatch, capsys, file):
  arguments = (file, '--rows=method', '--columns=val_loss', '--baseline=method=dense')
  code, out, _ = report(monkeypatch, capsys, *arguments, '--margin=val_loss=0.5')
  assert code == 0 and 'not shown: Δ is not smaller |' in out
  code, out, _ = report(monkeypatch, capsys, *arguments, '--margin=val_loss=5')
  assert code == 0 and 'yes (p = 0.007) |' in out


def test_all_labels_and_known_metrics_by_default(monkeypatch, capsys, file):
  _, out, _ = report(monkeypatch, capsys, file, '--format=csv')
  header = out.splitlines()[0]
  assert header.startswith('method,sparsity,seeds,val_loss_mean') and 'stored_bytes_n' in header


def test_latex_and_figure(monkeypatch, capsys, file, tmp_path):
  figure = tmp_path / 'out' / 'a.png'
  axes = ('--x=sparsity', '--y=val_loss', '--series=method')
  code, out, _ = report(
    monkeypatch,
    capsys,
    file,
    '--format=latex',
    f'--figure={figure}',
    *axes,
    '--baseline=sparsity=0',
  )
  assert code == 0 and out.startswith('\\begin{table}')
  assert figure.exists() and figure.with_suffix('.pdf').exists()


@pytest.mark.parametrize(
  ('argument', 'hint'),
  [
    ('--columns=val_los', "did you mean 'val_loss'"),
    ('--rows=methd', "did you mean 'method'"),
    ('--baseline=method=dens', "did you mean 'dense'"),
    ('--baseline=methd=dense', "did you mean 'method'"),
    ('--baseline=dense', 'label=value'),
    ('--rows=method,sparsity --figure=a.jpg --x=a --y=b --series=c', '.png'),
    ('missing.jsonl', 'missing.jsonl'),
    ('--margin=val_loss=0.1', '--baseline'),
    ('--margin=0.1 --baseline=method=dense', 'metric=value'),
    ('--margin=val_los=0.1 --baseline=method=dense', "did you mean 'val_loss'"),
    ('--margin=val_loss=-1 --baseline=method=dense', 'valid: a float32 number in (0, inf)'),
    ('--margin=val_loss=much --baseline=method=dense', 'much'),
  ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, file, argument, hint):
  code, out, err = report(monkeypatch, capsys, file, *argument.split())
  assert (code, out) == (2, '')
  assert hint in err and err.count('\n') == 1 and err.startswith('error: ')


@pytest.mark.parametrize('argument', ['--column=val_loss', '--figure=a.png', '--format=html'])
def test_bad_flags_exit_with_2(monkeypatch, capsys, file, argument):
  code, out, err = report(monkeypatch, capsys, file, argument)
  assert (code, out) == (2, '') and 'error' in err


def workdir(folder, letter, seed, loss, **fields):
  """A finished run's folder with what `report` reads."""
  config = {'seed': seed, 'model': {'width': 64}, 'train': {'log_every': seed + 1}}
  config['weight'] = {'name': 'none', 'sparsity': 0.0, 'dense': ['embed', 'head']} | fields
  result = {'config': config, 'env': {}, 'metrics': {'val_loss': loss, 'train_step_ms': None}}
  path = folder / letter
  path.mkdir()
  write_json(path / 'result.json', result)
  return path


@pytest.fixture
def workdirs(tmp_path):
  sparse = {'name': 'rigl', 'sparsity': 0.9, 'period': 100}
  return [
    workdir(tmp_path, 'a', 0, 1.0),
    workdir(tmp_path, 'b', 1, 1.2),
    workdir(tmp_path, 'c', 0, 1.5, **sparse),
    workdir(tmp_path, 'd', 1, 1.9, **sparse) / 'result.json',
  ]


def cells(out):
  rows = [row for row in out.splitlines() if row.startswith('|')]
  return [[cell.strip() for cell in row.strip('|').split('|')] for row in rows if '--' not in row]


def test_workdirs_are_told_apart_by_the_fields_that_differ(monkeypatch, capsys, workdirs):
  code, out, err = report(monkeypatch, capsys, *workdirs, '--columns=val_loss')
  assert (code, err) == (0, '')
  # Neither the seed nor what is logged is a label, nor a field that one method alone has.
  assert cells(out) == [
    ['weight.name', 'weight.sparsity', 'seeds', 'validation loss (nats/token)'],
    ['none', '0', '2', '1.1000 ± 0.1414'],
    ['RigL', '0.9', '2', '1.7000 ± 0.2828'],
  ]


def test_any_field_may_be_asked_for_and_be_a_baseline(monkeypatch, capsys, workdirs):
  arguments = (
    '--rows=weight.period,model.width,weight.dense',
    '--columns=val_loss',
    '--baseline=weight.name=none',
  )
  code, out, err = report(monkeypatch, capsys, *workdirs, *arguments)
  assert (code, err) == (0, '')
  assert cells(out)[1:] == [
    ['—', '64', 'embed, head', '2', '1.1000 ± 0.1414', '—'],
    ['100', '64', 'embed, head', '2', '1.7000 ± 0.2828', '+0.6000 [-0.6706, +1.8706]'],
  ]


def test_workdirs_stand_beside_studies(monkeypatch, capsys, file, workdirs):
  code, out, err = report(monkeypatch, capsys, file, workdirs[2], '--columns=val_loss')
  assert (code, err) == (0, '')
  assert cells(out)[0][:3] == ['method', 'sparsity', 'weight.name']
  assert cells(out)[-1] == ['—', '—', 'RigL', '1', '1.5000']
  # One run alone, too.
  assert cells(report(monkeypatch, capsys, workdirs[2], '--columns=val_loss')[1])[1][0] == 'RigL'


def test_rows_that_mix_runs_are_refused(monkeypatch, capsys, workdirs):
  code, _, err = report(monkeypatch, capsys, *workdirs, '--rows=model.width')
  assert code == 2 and "add 'weight.name' to the rows" in err and err.count('\n') == 1


def test_what_is_no_finished_run_is_one_line(monkeypatch, capsys, workdirs, tmp_path):
  (tmp_path / 'other.json').write_text('[1, 2]')
  (tmp_path / 'empty').mkdir()
  for paths, said in (
    ([tmp_path / 'empty'], 'holds no finished run (no result.json)'),
    ([tmp_path / 'missing.json'], 'holds no finished run'),
    ([tmp_path / 'other.json'], 'other.json'),
    ([*workdirs, '--rows=weight.sparsty'], "did you mean 'weight.sparsity'"),
  ):
    code, out, err = report(monkeypatch, capsys, *paths)
    assert (code, out) == (2, '') and said in err and err.count('\n') == 1
