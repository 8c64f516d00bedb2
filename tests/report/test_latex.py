"""LaTeX tables compile, and print their labels as they are."""

import os
import re
import shutil
import subprocess

import pytest

from sparse_lm.report import latex, table
from sparse_lm.report import tex as tex_text
from sparse_lm.report.table import Column

LABELS = [
  '[0, 1]', '*', '[', ']', '**bold**', '#1 of #2', '50 % & more', 'a_b^c~d', '{open', 'close}', '$x$',
  r'\textbf{x} \\ \end{tabular}', '<a|b>', '"quoted"', "it's `so`", '--config.a=b', '---', '-1.5',
  "''", '?`!`',
  'αβγ ΔΩ Αο ς', 'é ü ñ ç š Å ő ß æ Ø ł', '± × ≤ ≥ ≠ ≈ → ∞ √ − · ² µ ° … — –',
  '日本語 🙂 ﬁ ½', 'two\n\nlines\tand a tab',
  '\x00\x1b', '', ' ', ['up', '[down]'], [], (0.5, 0.25), {'a': [1]}, None, True, 0.1, 3,
]  # fmt: skip


def line(number, labels):
  return {
    'study': '#x_y{',
    'run': str(number),
    'labels': labels,
    'seed': 0,
    'metrics': {'x_%': -1.5},
  }


@pytest.fixture(scope='module')
def tex():
  lines = [line(i, {'[la#bel]_α': label, 'row': i}) for i, label in enumerate(LABELS)]
  frame = table.summarise(lines, ['[la#bel]_α', 'row'], [Column('x_%', '* Δ & #', unit='µs')])
  return latex.latex(frame, '[50 % of #1] *α_β*', "python -m x --rows='[a],*'", '#x_y{ [z]')


def test_every_label_is_a_row_of_its_own(tex):
  body = tex.partition('\\midrule')[2].partition('\\bottomrule')[0]
  rows = [row for row in body.splitlines() if row.strip()]
  assert len(rows) == len(LABELS) and all(row.endswith(r' \\') for row in rows)
  assert all(len(re.findall(r'(?<!\\)&', row)) == 2 for row in rows)
  assert not any(row.lstrip().startswith(('[', '*')) for row in rows)
  assert tex.isascii()


def test_every_character_is_ascii_with_its_braces_and_dollars_in_pairs():
  for char in map(chr, [*range(0x180), *range(0x370, 0x400), *range(0x2190, 0x2270), 0x65E5]):
    shown = tex_text.escaped(f'x{char}y')
    bare = re.sub(r'\\[\\{}$%&#_]', '', shown)
    assert shown.isascii() and bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0, char
    assert not set('#%&_') & set(bare), char


def test_tex_compiles_the_table_and_prints_the_labels(tex, tmp_path):
  assert (compiled(tex, tmp_path) / 'table.pdf').stat().st_size > 5000


def compiled(tex, folder, height='50cm'):
  """The folder with the PDF of a document in columns of 3.3 inches; it must not be overfull."""
  if shutil.which('pdflatex') is None:
    if os.environ.get('CI'):
      pytest.fail('CI has no pdflatex; .ci/run installs it')
    pytest.skip('no pdflatex: install texlive-latex-base and texlive-latex-recommended (booktabs)')
  head = '\\documentclass{article}\\usepackage{booktabs}\\textwidth=3.3in'
  head += f'\\textheight={height}'
  page = f'{head}\\begin{{document}}\n{tex}\\end{{document}}\n'
  (folder / 'table.tex').write_text(page)
  command = ['pdflatex', '-halt-on-error', '-interaction=nonstopmode', 'table.tex']
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors='replace')
  assert done.returncode == 0, done.stdout[-2000:]
  for fault in ('undefined', 'Missing character', 'Overfull'):
    assert fault not in done.stdout
  return folder


def study(losses):
  """Lines of methods at two sparsities, with every metric that tables know."""
  for method, sparsity, values in losses:
    for seed, loss in enumerate(values):
      metrics = {c.metric: 123456.789 for c in table.COLUMNS} | {'val_loss': loss}
      yield line(f'{method}{sparsity}{seed}', {'method': method, 'sparsity': sparsity}) | {
        'seed': seed,
        'metrics': metrics,
      }


LOSSES = [
  ('dense', 0.0, (2.0, 2.1, 2.2)),
  ('rigl', 0.5, (2.10, 2.20, 2.30)), ('rigl', 0.9, (2.40, 2.51, 2.60)),
  ('statistical_topk', 0.5, (2.2, 2.31, 2.40)), ('statistical_topk', 0.9, (2.41, 2.49, 2.61)),
]  # fmt: skip


@pytest.fixture(scope='module')
def wide():
  """Every known metric in one table."""
  frame = table.summarise(
    list(study(LOSSES)), ['method', 'sparsity'], table.COLUMNS, {'method': 'dense'}
  )
  command = 'python -m sparse_lm.report results/a_long_name_of_a_study/runs.jsonl --rows=a,b,c,d,e'
  return latex.latex(frame, 'All metrics', command, 'all')


def test_a_wide_table_fits_a_column_in_several_floats(wide, tmp_path):
  compiled(wide, tmp_path)
  parts = wide.split('\\end{table}')[:-1]
  assert len(parts) > 3
  for i, part in enumerate(parts):
    assert f'(part {i + 1} of {len(parts)})' in part
    assert f'\\label{{tab:all{f"-{i + 1}" if i else ""}}}' in part
    rows = [row for row in part.splitlines() if row.startswith('0')]
    assert [row.split(' & ')[0] for row in rows] == ['0', '0.5', '0.9', '0.5', '0.9']
  assert wide.count('Reproduce') == parts[-1].count('Reproduce') == 1


@pytest.mark.parametrize('count, pages', [(22, 1), (45, 2), (110, 3)])
def test_a_long_table_is_continued_on_further_pages(count, pages, tmp_path):
  losses = [
    (method, round(i / count, 3), (2.0 + 0.01 * i, 2.1))
    for method in ('dense', 'rigl')
    for i in range(count // 2)
  ]
  lines = list(study(losses))
  columns = [table.column('val_loss')]
  frame = table.summarise(lines, ['method', 'sparsity'], columns, {'method': 'dense'})
  shown = latex.latex(frame, 'A caption of a usual length. ' * 8, 'python -m x', 'long')
  parts = shown.split('\\end{table}')[:-1]
  assert len(parts) == pages == shown.count(r'\toprule')
  rows = re.findall(r'^(0[\d.]*) & ', shown, re.MULTILINE)
  assert rows == [f'{sparsity:g}' for _, sparsity, _ in losses]
  continued = [f'(part {i + 1} of {pages}, continued)' in part for i, part in enumerate(parts)]
  assert continued == [False] + [True] * (pages - 1)
  # Each page begins with the heading of the group that its first row belongs to.
  assert all('multicolumn' in part.partition('midrule')[2].splitlines()[1] for part in parts)
  folder = compiled(shown, tmp_path, height='550pt')  # as in the article class
  assert 'Float too large' not in (folder / 'table.log').read_text(errors='replace')


def test_a_loss_and_its_difference_stand_beside_each_other(tmp_path):
  frame = table.summarise(
    list(study(LOSSES)), ['method', 'sparsity'], [table.column('val_loss')], {'method': 'dense'}
  )
  shown = latex.latex(frame, 'Losses', 'python -m x', 'losses')
  compiled(shown, tmp_path)
  assert shown.count('\\begin{table}') == 1 and '{[}+0.' in shown


def test_units_stand_in_the_head_and_groups_have_display_names(wide):
  head, _, body = wide.partition('\\midrule')
  assert r'validation loss \\ (nats/token)' in head and r'method \\ sparsity' in head
  groups = re.findall(r'multicolumn\{\d\}\{@\{\}l\}\{(.*)\} ', body.partition('\\bottomrule')[0])
  assert groups == ['dense', 'RigL', 'statistical top-k']


def test_the_best_is_bold_where_it_is_significantly_better(wide):
  # At 50 % the differences of the seeds are 0.10, 0.11, 0.10; at 90 % they are 0.01, -0.02, 0.01.
  assert re.findall(r'textbf\{([\d.]+)', wide) == ['2.2000']
  assert wide.count('Bold:') == 1


def test_every_row_with_one_label_is_compared_with_all_others():
  found = list(
    study([('a', 0.5, (1.0, 2.0)), ('b', 0.5, (1.5, 2.5001)), ('c', 0.5, (1.6, 2.6001))])
  )
  frame = table.summarise(found, ['method'], [table.column('val_loss')])
  assert frame.attrs['best'] == {'val_loss': [True, False, False]}
  tie = list(study([('a', 0.5, (1.0, 2.0)), ('b', 0.5, (1.0, 2.0))]))
  frame = table.summarise(tie, ['method'], [table.column('val_loss')])
  assert frame.attrs['best'] == {'val_loss': [False, False]}
