"""Documents are made from lines, and what lines refute is not printed."""

import json
import re

import pytest

from experiments import documents, smoke
from experiments.findings import Findings
from experiments.study import Study
from sparse_lm.core.errors import UserError
from sparse_lm.report import plot

ENV = {'device': 'cpu', 'cores': 2, 'cpu': 'A CPU', 'instruction_set': 'AVX2', 'jax': '0.10.2'}
METRICS = (
  'sparsity_prunable',
  'sparsity_total',
  'nonzero_params',
  'flops_forward',
  'flops_forward_ratio',
  'flops_training_ratio',
  'stored_bytes',
  'train_step_ms',
)


def test_the_committed_documents_are_those_of_the_committed_lines(tmp_path, monkeypatch):
  monkeypatch.setattr(plot, 'save', lambda *_: [])
  written = documents.documents(tmp_path)
  assert documents.ROOT / 'README.md' in written
  stale = [str(path) for path, text in written.items() if path.read_text(encoding='utf-8') != text]
  assert stale == [], 'run: python -m experiments.documents'


def test_the_index_of_results_shows_every_page():
  pages = {path.stem for path in (documents.ROOT / 'docs' / 'results').glob('*.md')} - {'index'}
  index = (documents.ROOT / 'docs' / 'results' / 'index.md').read_text(encoding='utf-8')
  assert pages == set(re.findall(r'^## \[.+\]\((\w+)\.md\)$', index, re.MULTILINE))
  _, _, toctree = index.partition('{toctree}')
  assert pages <= set(toctree.split())
  assert documents.title('one_shot') == 'One-shot pruning'


def lines_of(runs, loss):
  for run in runs:
    metrics = dict.fromkeys(METRICS, 1.0) | {'val_loss': loss[run.labels['method']]}
    yield {
      'study': 'smoke',
      'run': run.id('smoke'),
      'labels': run.labels,
      'seed': run.overrides['seed'],
      'command': run.command('HERE/smoke/runs/x'),
      'env': ENV,
      'config': {'dropped': True},
      'metrics': metrics,
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
  """An empty project, and results in which static masks lose most."""
  root = tmp_path / 'project'
  monkeypatch.setattr(documents, 'ROOT', root)
  monkeypatch.setattr(documents, 'LINES', root / 'docs' / 'lines')
  monkeypatch.setattr(documents, 'TEMPLATES', root / 'docs' / 'templates')
  documents.TEMPLATES.mkdir(parents=True)
  losses = {run.labels['method']: 2.0 + i / 8 for i, run in enumerate(smoke.runs())}
  losses['static'] = 5.0
  file = tmp_path / 'results' / 'smoke' / 'runs.jsonl'
  file.parent.mkdir(parents=True)
  text = ''.join(json.dumps(line) + '\n' for line in lines_of(smoke.runs(), losses))
  file.write_text(text.replace('HERE', str(tmp_path / 'results')))
  return root


def write(project, template):
  (documents.TEMPLATES / 'README.md').write_text(template)
  documents.write(['smoke'], str(project.parent / 'results'))
  return (project / 'README.md').read_text()


def test_prose_quotes_the_lines_and_figures_lie_beside_it(project):
  template = (
    "{% set s = study('smoke') %}Static: {{ s.text('val_loss', method='static') }},\n"
    "worst {{ s.highest('val_loss', by='method') }}, best {{ s.lowest('val_loss', by='method') }}.\n"
    "{{- claim('static loses', s.mean('val_loss', method='static') > 4) }}\n"
    "{{ s.differences('val_loss', {'method': 'dense'}, method='static') }} on {{ s.machine }}\n"
    "off 4.5: {{ s.furthest('val_loss', 4.5, method='static') }}\n"
  )
  shown = write(project, template)
  assert shown == (
    'Static: 5.000,\nworst static, best dense.\n'
    '[3.0] on 2 cores of A CPU, AVX2, jax 0.10.2\noff 4.5: 0.5\n'
  )
  assert (documents.LINES / 'smoke.jsonl').read_text().count('\n') == len(smoke.runs())
  kept = (documents.LINES / 'smoke.jsonl').read_text()
  assert 'dropped' not in kept
  # A machine's own folders are nobody else's.
  assert str(project.parent) not in kept and '--workdir=results/smoke/runs/x' in kept
  template = "{{ study('smoke').table }}\n![](docs/results/smoke.png)\n"
  assert '| static' in write(project, template)
  assert (project / 'docs' / 'results' / 'smoke.png').stat().st_size > 1000


def test_a_page_compares_with_any_row(project):
  row = "{{ study('smoke').compared('val_loss', margin=0.5, method='static') }}"
  shown = write(project, row)
  (dense,) = [line for line in shown.splitlines() if line.startswith('| dense')]
  assert [cell.strip() for cell in dense.strip('|').split('|')] == [
    'dense', '0', '1', '2.0000', '-3.0000', 'not shown: 1 seed',
  ]  # fmt: skip
  command = (
    'python -m sparse_lm.report results/smoke/runs.jsonl --rows=method,sparsity --columns=val_loss '
    '--baseline=method=static --margin=val_loss=0.5'
  )
  assert f'`{command}`' in shown


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (
      "{{ claim('static wins', study('smoke').mean('val_loss', method='static') < 3) }}",
      'static wins',
    ),
    ("{{ study('smoke').mean('val_loss', sparsity=0.9) }}", '3 rows'),
    ("{{ study('smoke').mean('val_loss', method='stat') }}", '0 rows'),
    ("{{ study('smoke').mean('val_los', method='static') }}", 'val_loss'),
    ('{{ unknown }}', 'unknown'),
    ('{{ study("smoke" }}', 'README.md'),
    ("{{ study('sparsity_vs_accuracy').machine }}", 'sparsity_vs_accuracy'),
  ],
)
def test_what_the_lines_do_not_say_stops_the_command_and_writes_nothing(project, template, message):
  with pytest.raises(UserError, match=message) as caught:
    write(project, template)
  assert 'docs/templates/README.md' in str(caught.value)
  assert not (project / 'README.md').exists()


def test_lines_of_a_list_are_broken_anew():
  long = 'word ' * 40
  first, *rest = documents.bullets(f'- one\n  two-\n  three\n- {long}').splitlines()
  assert first == '- one two- three'
  assert rest[0].startswith('- word') and all(line.startswith('  word') for line in rest[1:])
  assert len(rest) == 2 and max(map(len, rest)) <= 110


def test_an_unfinished_study_is_not_taken(project):
  file = project.parent / 'results' / 'smoke' / 'runs.jsonl'
  file.write_text(file.read_text().partition('\n')[2])
  with pytest.raises(UserError, match='lacks 1 of the 5 runs'):
    documents.take('smoke', str(project.parent / 'results'))
  assert not documents.LINES.exists()


def test_means_are_over_the_seeds_of_one_row(tmp_path):
  study = Study.load('sparsity_vs_accuracy', tmp_path)
  found = Findings(study)
  with pytest.raises(UserError, match='lacks 32 of the 32 runs'):
    _ = found.lines
