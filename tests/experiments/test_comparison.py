"""The common study: what it plans, its table and figure, and a study file that uses it."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from experiments import study as study_module
from experiments.comparison import Comparison, with_metric
from sparse_lm.core.errors import UserError
from sparse_lm.report import results

STUDY = Comparison(
  config='configs/tiny.py',
  methods={'RigL': {'weight.name': 'rigl', 'weight.period': 5}, 'SET': {'weight.name': 'set'}},
  sparsities=(0.5, 0.9),
  seeds=(0, 2),
  caption='A test',
  dense={'dense': {}, 'small dense': {'model.width': 8}},
  common={'train.steps': 4},
)


def test_it_plans_each_row_over_the_seeds_dense_models_first():
  rows = [('dense', 0.0, {}), ('small dense', 0.0, {'model.width': 8})]
  for name, fields in STUDY.methods.items():
    rows += [(name, s, fields | {'weight.sparsity': s}) for s in (0.5, 0.9)]
  wanted = [
    ({'method': name, 'sparsity': s}, fields | {'train.steps': 4, 'seed': seed})
    for (name, s, fields), seed in itertools.product(rows, (0, 2))
  ]
  assert [(run.labels, run.overrides) for run in STUDY.runs()] == wanted
  assert {run.config for run in STUDY.runs()} == {'configs/tiny.py'}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'seeds': ()}, 'seeds=()'),
    ({'methods': {}}, 'methods={}'),
    ({'dense': {}}, 'dense={}'),
    ({'sparsities': (0.5, 90)}, 'sparsities=90 is not valid; valid: numbers above 0 and below 1'),
    ({'sparsities': (0.0,)}, 'sparsities=0.0'),
    ({'methods': {'dense': {}}}, "methods='dense'"),
    ({'margin': -1.0}, 'margin=-1.0 is not valid; valid: at least 0'),
    ({'margin': 0.1, 'columns': ('stored_bytes',)}, "valid: 0, or columns with 'val_loss'"),
  ],
)
def test_a_comparison_that_cannot_be_made_is_refused(fields, message):
  with pytest.raises(UserError) as error:
    dataclasses.replace(STUDY, **fields)
  assert message in str(error.value) and '; valid: ' in str(error.value)


OUTSIDE = '''"""Does moving connections pay at this size?"""

from experiments.comparison import Comparison, with_metric
from sparse_lm.report import plot
from sparse_lm.report.table import Column

STUDY = Comparison(
  config='configs/tiny.py',
  methods={'RigL': {'weight.name': 'rigl', 'weight.period': 2}},
  sparsities=(0.5,),
  seeds=(0, 1),
  common=COMMON,
  caption='Connections that move',
  columns=('val_loss', Column('loss_per_kb', 'loss per byte', '.5f', 'nats/kB', 1e3)),
)
runs = STUDY.runs


def report(lines, folder):
  lines = with_metric(lines, 'loss_per_kb', lambda m: m['val_loss'] / m['stored_bytes'])
  plot.save(plot.curves(lines, 'stored_bytes', 'val_loss', 'method'), folder, 'loss_and_bytes')
  return STUDY.report(lines, folder)
'''


@pytest.fixture
def file(tmp_path, tiny_config, monkeypatch):
  """A study outside the package, with a column and a figure of its own, of runs of four steps."""
  monkeypatch.setattr(sys, 'path', list(sys.path))
  config = tiny_config(train__steps=4)
  common = {f'{group}.{field}': config[group][field] for group, field in (
    ('data', 'source'), ('data', 'path'), ('data', 'tokenizer'), ('data', 'context'),
    ('data', 'batch'), ('model', 'layers'), ('model', 'width'), ('model', 'hidden'),
    ('model', 'heads'), ('model', 'kv_heads'), ('train', 'steps'),
  )}  # fmt: skip
  path = tmp_path / 'moving.py'
  path.write_text(OUTSIDE.replace('COMMON', repr(common)))
  yield path
  sys.modules.pop('study_moving', None)


def test_a_study_outside_is_interrupted_continued_and_reported(
  file, run_study, tmp_path, monkeypatch
):
  assert len(OUTSIDE.splitlines()) <= 25
  folder = tmp_path / 'results' / 'moving'
  train, begun = study_module._train, []

  def interrupted(run, workdir):
    begun.append(workdir.name)
    if len(begun) == 3:
      raise KeyboardInterrupt
    return train(run, workdir)

  with monkeypatch.context() as patch:
    patch.setattr(study_module, '_train', interrupted)
    assert run_study(str(file), f'--results={folder.parent}').code == 130
    assert len((folder / 'runs.jsonl').read_text().splitlines()) == 2
    done = run_study(str(file), f'--results={folder.parent}')
  assert done.code == 0 and len(begun) == 5 and begun[2] == begun[3]
  metrics = {}
  for line in map(json.loads, (folder / 'runs.jsonl').read_text().splitlines()):
    metrics.setdefault(line['labels']['method'], []).append(line['metrics'])
  loss = {name: np.array([m['val_loss'] for m in found]) for name, found in metrics.items()}
  ratio = {
    name: [1e3 * m['val_loss'] / m['stored_bytes'] for m in found]
    for name, found in metrics.items()
  }
  (row,) = [line for line in done.out.splitlines() if line.startswith('| RigL')]
  assert f'{np.mean(loss["RigL"]):.4f}' in row
  assert f'{np.mean(loss["RigL"] - loss["dense"]):+.4f}' in row
  assert f'{np.mean(ratio["RigL"]):.5f}' in row
  assert 'loss per byte (nats/kB)' in done.out and f'`python -m experiments.run {file}`' in done.out
  assert {path.name for path in folder.glob('*.*')} >= {
    *('table.md', 'table.tex', 'table.csv', 'moving.png', 'moving.pdf', 'loss_and_bytes.png')
  }


def test_a_margin_adds_the_equivalence_test_and_the_default_columns_show_time(tmp_path):
  noise = np.random.default_rng(0)
  lines = [
    {
      'run': f'{run.labels}-{number}',
      'labels': run.labels,
      'seed': run.overrides['seed'],
      'metrics': {
        **dict.fromkeys(('sparsity_prunable', 'flops_forward_ratio', 'flops_training_ratio'), 0.5),
        'val_loss': 2.0 + 1e-3 * noise.normal(),
        'stored_bytes': 1000,
        'train_step_ms': 12.3,
      },
    }
    for number, run in enumerate(dataclasses.replace(STUDY, seeds=(0, 1, 2)).runs())
  ]
  plain, tested = (
    dataclasses.replace(STUDY, margin=margin).report(lines, tmp_path) for margin in (0.0, 0.05)
  )
  assert 'training step (ms)' in plain and '12.3 |' in plain
  assert 'yes (p' not in plain and tested.count('yes (p') == 5  # each row but the baseline


def test_a_metric_is_added_to_each_line_and_nan_stays_nan():
  line = {'run': 'r', 'labels': {}, 'seed': 0, 'metrics': {'a': 2.0}}
  lost = results.with_diverged([line, line | {'run': 's'} | results.diverged('nan')])
  found = with_metric(lost, 'twice', lambda metrics: 2 * metrics['a'])
  assert found[0]['metrics'] == {'a': 2.0, 'twice': 4.0} and np.isnan(found[1]['metrics']['twice'])
  assert line['metrics'] == {'a': 2.0}
