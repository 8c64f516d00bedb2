import json
import sys

import pytest

from sparse_lm.report.__main__ import main


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
  row = next(row for row in out.splitlines() if row.startswith('| rigl'))
  cells = [cell.strip() for cell in row.strip('|').split('|')]
  assert cells == ['rigl', '2', '1.7000 ± 0.2828', '+0.6000 ± 0.1414', '2.0']
  assert '--columns=val_loss,stored_bytes --baseline=method=dense`' in out


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
