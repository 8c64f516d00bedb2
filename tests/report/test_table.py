import csv
import io
import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sparse_lm.core.errors import UserError
from sparse_lm.report import formats, latex, results, table
from sparse_lm.report.table import Column

LOSSES = {
  ('dense', None): {0: 1.00, 1: 1.10, 2: 1.30},
  ('rigl', 0.9): {0: 1.20, 1: 1.36, 2: 1.45},
  ('set', 0.9): {1: 1.40, 3: 9.00},
  ('static', 0.5): {0: 2.50},
}


def line(run, seed, labels, **metrics):
  return {'study': 's', 'run': run, 'labels': labels, 'seed': seed, 'metrics': metrics}


@pytest.fixture
def lines():
  found = []
  for (method, sparsity), losses in LOSSES.items():
    labels = {'method': method} | ({} if sparsity is None else {'sparsity': sparsity})
    for seed, loss in losses.items():
      metrics = {'val_loss': loss, 'stored_bytes': 123456, 'train_step_ms': 10 + seed}
      found.append(line(f'{method}{seed}', seed, labels, **metrics))
  return found


FLOPS = (
  'flops_forward',
  'flops_forward_ratio',
  'flops_forward_causal_ratio',
  'flops_training_ratio',
  'flops_training_total_ratio',
)
COLUMNS = [
  Column('val_loss', 'loss_a', '.3f', 'nats', paired=True),
  Column('stored_bytes', 'stored', ',.1f', 'kB', 1e-3),
]


@pytest.fixture
def frame(lines):
  return table.summarise(lines, ['method', 'sparsity'], COLUMNS, {'method': 'dense'})


def test_means_spreads_and_counts_by_hand(frame):
  assert list(frame['method']) == ['dense', 'rigl', 'set', 'static']
  assert list(frame['seeds']) == [3, 3, 2, 1]
  np.testing.assert_allclose(frame['val_loss_mean'], [3.4 / 3, 4.01 / 3, 5.2, 2.5])
  # Of 1.0, 1.1, 1.3: deviations -.4/3, -.1/3, .5/3; sum of squares .42/9; over n - 1 = 2.
  assert frame['val_loss_std'][0] == pytest.approx(math.sqrt(0.42 / 18))
  assert frame['val_loss_std'][1] == pytest.approx(np.std([1.2, 1.36, 1.45], ddof=1))
  assert math.isnan(frame['val_loss_std'][3])


def test_agrees_with_pandas(lines, frame):
  plain = pd.DataFrame({**x['labels'], 'loss': x['metrics']['val_loss']} for x in lines)
  wanted = plain.groupby('method', sort=False)['loss'].agg(['mean', 'std', 'count'])
  found = frame[['val_loss_mean', 'val_loss_std', 'val_loss_n']]
  np.testing.assert_allclose(found.to_numpy(float), wanted.to_numpy(float))


def test_differences_are_paired_by_seed(frame):
  # rigl - dense: .20, .26, .15; set shares seed 1 only: .30; static seed 0: 1.5.
  np.testing.assert_allclose(frame['val_loss_delta_mean'][1:], [0.61 / 3, 0.3, 1.5])
  assert frame['val_loss_delta_std'][1] == pytest.approx(np.std([0.2, 0.26, 0.15], ddof=1))
  assert frame['val_loss_delta_std'][2:].isna().all()
  assert list(frame['val_loss_delta_n']) == [0, 3, 1, 1]
  assert 'stored_bytes_delta_mean' not in frame


def test_several_baselines_are_matched_by_the_other_labels():
  rows = [('dense', 'x', 1.0), ('dense', 'y', 5.0), ('rigl', 'x', 1.5), ('rigl', 'y', 7.0)]
  rows += [('rigl', 'z', 7.0)]
  found = [line(m + c, 0, {'method': m, 'corpus': c}, val_loss=loss) for m, c, loss in rows]
  columns = [Column('val_loss', paired=True)]
  frame = table.summarise(found, ['method', 'corpus'], columns, {'method': 'dense'})
  np.testing.assert_allclose(frame['val_loss_delta_mean'], [np.nan, np.nan, 0.5, 2.0, np.nan])


def test_a_metric_that_some_runs_lack_and_one_that_diverged():
  found = [line('a', 0, {'m': 'a'}, x=1.0, y=1.0), line('b', 0, {'m': 'b'}, y=2.0)]
  found += [line('c', 1, {'m': 'b'}, y=math.nan)]
  frame = table.summarise(found, ['m'], [Column('x'), Column('y')])
  assert list(frame['x_n']) == [1, 0]
  printed = formats.text(frame)
  assert list(printed['x']) == ['1', '—'] and list(printed['y']) == ['1', 'nan']


def test_bad_names_are_answered_with_the_nearest(lines):
  with pytest.raises(UserError, match="did you mean 'val_loss'"):
    table.summarise(lines, ['method', 'sparsity'], [Column('val_los')])
  with pytest.raises(UserError, match="did you mean 'method'"):
    table.summarise(lines, ['methods'], COLUMNS)
  with pytest.raises(UserError, match='baseline'):
    table.summarise(lines, ['method', 'sparsity'], COLUMNS, {'method': 'none'})
  with pytest.raises(ValueError, match='heading'):
    table.summarise(lines, ['method', 'sparsity'], [COLUMNS[0], COLUMNS[0]])


def test_no_difference_of_times():
  with pytest.raises(ValueError, match='as measured'):
    Column('train_step_ms', unit='ms', paired=True)
  assert not table.column('train_step_ms').paired


def test_times_carry_their_caveat(lines, frame):
  rows = ['method', 'sparsity']
  timed = table.summarise(lines, rows, [table.column('train_step_ms')], {'method': 'dense'})
  assert 'claims of speed' in formats.notes(timed)
  assert 'claims of speed' not in formats.notes(frame)
  assert not any('delta' in name for name in timed)


def test_printed_cells(frame):
  printed = formats.text(frame)
  assert list(printed) == [
    'method',
    'sparsity',
    'seeds',
    'loss_a (nats)',
    'Δ loss_a (nats)',
    'stored (kB)',
  ]
  assert list(printed.loc[0]) == ['dense', '—', '3', '1.133 ± 0.153', '—', '123.5']
  interval = (
    '+0.203 [+0.067, +0.340]*'  # t interval with two degrees of freedom: 4.303 · 0.0551 / √3
  )
  assert list(printed.loc[1]) == ['RigL', '0.9', '3', '1.337 ± 0.127', interval, '123.5']
  assert list(printed.loc[3]) == ['static', '0.5', '1', '2.500', '+1.500', '123.5']


def test_differences_carry_intervals_and_tests_in_their_own_columns(lines):
  columns = [Column('val_loss', 'loss', '.3f', 'nats', paired=True, margin=0.25)]
  frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'dense'})
  wanted = scipy.stats.ttest_rel([1.2, 1.36, 1.45], [1.0, 1.1, 1.3])
  row = frame.loc[1]
  low, high = wanted.confidence_interval(0.95)
  assert (row['val_loss_delta_low'], row['val_loss_delta_high']) == pytest.approx((low, high))
  assert row['val_loss_delta_p'] == pytest.approx(wanted.pvalue)
  # The only row with two seeds or more: there is nothing to correct for.
  assert row['val_loss_delta_p_holm'] == pytest.approx(wanted.pvalue)
  greater = scipy.stats.ttest_1samp([0.2 - 0.25, 0.26 - 0.25, 0.15 - 0.25], 0, alternative='less')
  assert row['val_loss_equivalence_p'] == pytest.approx(greater.pvalue)
  shown = list(formats.text(frame)['Δ within ±0.25 nats'])
  assert shown == ['—', 'not shown: needs 11 seeds', 'not shown: 1 seed', 'not shown: 1 seed']
  notes = formats.notes(frame)
  assert "Holm's correction for the 1 rows" in notes and 'TOST' in notes and '95% conf' in notes


def test_a_margin_needs_a_difference():
  with pytest.raises(ValueError, match='val_loss'):
    Column('val_loss', margin=0.1)


def test_the_mark_follows_the_corrected_p_value():
  random = np.random.default_rng(0)
  found, seeds = [], range(5)
  found += [line(f'base{s}', s, {'m': 'base'}, x=0.0) for s in seeds]
  for m in range(20):
    noise = random.normal(0.05, 0.03, len(seeds))
    found += [line(f'{m}-{s}', s, {'m': m}, x=float(noise[s])) for s in seeds]
  frame = table.summarise(found, ['m'], [Column('x', paired=True)], {'m': 'base'})
  marked = formats.text(frame)['Δ x'].str.endswith('*')
  assert list(marked) == list(frame['x_delta_p_holm'] < 0.05)
  assert marked.sum() < (frame['x_delta_p'] < 0.05).sum()


def test_written_files(frame, tmp_path):
  text = table.write(frame, tmp_path / 'x_y', '50% of a_b', 'python -m experiments.run x_y --list')
  assert sorted(path.name for path in (tmp_path / 'x_y').iterdir()) == [
    'table.csv', 'table.md', 'table.tex',
  ]  # fmt: skip
  assert text == (tmp_path / 'x_y' / 'table.md').read_text(encoding='utf-8')
  assert '**50% of a_b**' in text and '`python -m experiments.run x_y --list`' in text
  assert 'seeds 0, 1, 2, 3;' in text and 'from method dense' in text
  body = [row for row in text.splitlines() if row.startswith('|')]
  assert len(body) == 6 and len({row.count('|') for row in body}) == 1
  numbers = pd.read_csv(tmp_path / 'x_y' / 'table.csv')
  assert numbers['stored_bytes_mean'].tolist() == [123456] * 4
  assert numbers['val_loss_mean'][1] == pytest.approx(4.01 / 3, abs=1e-12)
  assert numbers['val_loss_n'].tolist() == [3, 3, 2, 1]


def test_csv_has_one_number_a_cell(frame):
  for row in csv.DictReader(io.StringIO(formats.csv(frame))):
    for name, value in row.items():
      if name != 'method':
        assert value == '' or math.isfinite(float(value))


def test_latex_is_booktabs_and_escaped(frame, tmp_path):
  table.write(frame, tmp_path / 'x_y', '50% of a_b & more', 'python -m run --a_b=~{1}')
  tex = (tmp_path / 'x_y' / 'table.tex').read_text(encoding='utf-8')
  for rule in ('toprule', 'midrule', 'bottomrule'):
    assert tex.count(f'\\{rule}') == 2  # two parts
  for name in ('table', 'tabular'):
    assert tex.count(f'\\begin{{{name}}}') == tex.count(f'\\end{{{name}}}') >= 2
  assert tex.isascii() and '$\\pm$' in tex and '$\\Delta$' in tex
  assert '50\\% of a\\_b \\& more' in tex
  assert '-{}-a\\_\\allowbreak{}b=\\allowbreak{}\\textasciitilde{}\\{1\\}' in tex
  assert '\\label{tab:x_y}' in tex
  rows = [row for row in tex.splitlines() if row.endswith(r'\\')]
  assert [len(re.findall(r'(?<!\\)&', row)) for row in rows] == 5 * [3] + 5 * [3]
  bare = re.sub(r'\\[{}]', '', tex)
  assert bare.count('{') == bare.count('}')
  unescaped = re.sub(r'\\label\{[^}]*\}', '', re.sub(r'\\[%_#]', '', tex))
  assert not set('%_#') & set(unescaped)


def test_latex_minus_and_markdown_pipe():
  found = [line('a', 0, {'m': 'a|b_-1'}, x=-1.5), line('b', 0, {'m': 'base'}, x=1.0)]
  frame = table.summarise(found, ['m'], [Column('x', paired=True)], {'m': 'base'})
  tex = latex.latex(frame, '', '', '')
  assert 'a\\textbar{}b\\_-1 & $-$1.5 & $-$2.5' in tex
  assert '| a\\|b_-1 |' in formats.markdown(frame, '', '')


def test_the_notes_state_each_convention_of_counting_once(lines):
  found = [entry | {'metrics': entry['metrics'] | dict.fromkeys(FLOPS, 1.0)} for entry in lines]
  columns = list(map(table.column, FLOPS))
  note = formats.notes(table.summarise(found, ['method', 'sparsity'], columns))
  assert note.count('Attention is charged over all pairs of the context') == 1
  assert note.count("Training FLOPs are those of the run's own steps") == 1
  assert note.count('Training FLOPs with ancestors add') == 1
  plain = formats.notes(table.summarise(lines, ['method', 'sparsity'], COLUMNS))
  assert 'Attention' not in plain and 'Training' not in plain


def test_the_notes_name_every_machine_once(lines):
  cpu = {'device': 'cpu', 'cores': 2, 'cpu': 'AMD EPYC', 'instruction_set': 'AVX2', 'jax': '0.10.2'}
  machines = [cpu, cpu, cpu | {'instruction_set': 'AVX-512'}, {'device': 'H100', 'jax': '0.11.2'}]
  made = [line | {'env': env} for line, env in zip(lines, machines)]
  note = formats.notes(table.summarise(made, ['method', 'sparsity'], COLUMNS))
  assert note.endswith(
    'Made on 2 cores of AMD EPYC, AVX2, jax 0.10.2; and on 2 cores of AMD EPYC, AVX-512, jax 0.10.2; '
    'and on H100, jax 0.11.2.'
  )


def test_a_row_with_a_diverged_seed_says_so_instead_of_a_mean(lines):
  lost = line('rigl3', 3, {'method': 'rigl', 'sparsity': 0.9}) | results.diverged('loss is nan')
  alone = line('l00', 0, {'method': 'l0', 'sparsity': 0.9}) | results.diverged('loss is nan')
  found = results.with_diverged([*lines, lost, alone])
  frame = table.summarise(found, ['method', 'sparsity'], COLUMNS, {'method': 'dense'})
  rows = formats.text(frame).set_index('method')
  assert rows.loc['RigL'].tolist()[1:] == ['4, 1 diverged', 'diverged', 'diverged', 'diverged']
  assert rows.loc['L0'].tolist()[1:] == ['1, 1 diverged', 'diverged', 'diverged', 'diverged']
  # The other rows are what they are without it.
  plain = table.summarise(lines, ['method', 'sparsity'], COLUMNS, {'method': 'dense'})
  others = formats.text(plain).set_index('method').drop(index='RigL')
  assert rows.drop(index=['RigL', 'L0']).equals(others)
  for written in (formats.markdown(frame, 'c', 'x'), latex.latex(frame, 'c', 'x', 'l')):
    assert written.count('diverged') == 8
