"""LaTeX tables compile, and print their labels as they are."""

import os
import re
import shutil
import subprocess

import pytest

from sparse_lm.report import formats, table
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
  return formats.latex(frame, '[50 % of #1] *α_β*', "python -m x --rows='[a],*'", '#x_y{ [z]')


def test_every_label_is_a_row_of_its_own(tex):
  body = tex.partition('\\midrule')[2].partition('\\bottomrule')[0]
  rows = [row for row in body.splitlines() if row.strip()]
  assert len(rows) == len(LABELS) and all(row.endswith(r' \\') for row in rows)
  assert all(len(re.findall(r'(?<!\\)&', row)) == 3 for row in rows)
  assert not any(row.lstrip().startswith(('[', '*')) for row in rows)
  assert tex.isascii()


def test_every_character_is_ascii_with_its_braces_and_dollars_in_pairs():
  for char in map(chr, [*range(0x180), *range(0x370, 0x400), *range(0x2190, 0x2270), 0x65E5]):
    shown = formats._tex(f'x{char}y')
    bare = re.sub(r'\\[\\{}$%&#_]', '', shown)
    assert shown.isascii() and bare.count('{') == bare.count('}') and bare.count('$') % 2 == 0, char
    assert not set('#%&_') & set(bare), char


def test_tex_compiles_the_table_and_prints_the_labels(tex, tmp_path):
  if shutil.which('pdflatex') is None:
    if os.environ.get('CI'):
      pytest.fail('CI has no pdflatex; .ci/run installs it')
    pytest.skip('no pdflatex: install texlive-latex-base and texlive-latex-recommended (booktabs)')
  head = '\\documentclass{article}\\usepackage{booktabs}\\textheight=50cm'
  page = f'{head}\\begin{{document}}\n{tex}\\end{{document}}\n'
  (tmp_path / 'table.tex').write_text(page)
  command = ['pdflatex', '-halt-on-error', '-interaction=nonstopmode', 'table.tex']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors='replace')
  assert done.returncode == 0, done.stdout[-2000:]
  assert 'undefined' not in done.stdout and 'Missing character' not in done.stdout
  assert (tmp_path / 'table.pdf').stat().st_size > 5000
