"""A summary (see `table.summarise`) as LaTeX that fits one column of a paper.

The document needs booktabs and no other package. Columns that do not fit beside each other, and rows that
do not fit on a page, go to further `table` floats, with the same labels and the same heading.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd

from sparse_lm.report import formats, statistics, tex

COLUMN = 3.17 * 72.27  # points: the width of a column of LaTeX's article class
SEPARATION = 2.5  # points on each side of a column of a table
INDENT = 6  # points by which the rows of a group are indented
LABELS = 0.5  # of the width: the most that the labels of rows take
NARROWEST = 34  # points: headings are broken into lines of at least this width
BOLD = 1.18  # width of bold letters over that of others
PAGE = 520  # points: the height of a page of LaTeX's article class
LINE, SMALL_LINE = 9.5, 8.0  # points: heights of a line of a table and of its notes
SMALL = 0.8  # width of a letter of the notes over that of a letter of the table
# Widths of letters in Computer Modern of 8 points, in units of its 8.5 points; all others take 0.55.
_EM = {
  **dict.fromkeys("ijl.,:;'!|[] ", 0.3),
  **dict.fromkeys('()frts-', 0.42),
  **dict.fromkeys('0123456789*', 0.5),
  **dict.fromkeys('mwMW%@—…', 1.0),
  **dict.fromkeys('ABCDEFGHIJKLNOPQRSTUVXYZΔ±×+−=<>', 0.8),
}

_BREAK = r' \\ '  # between the lines of a cell


class _Column(NamedTuple):
  """A column of a LaTeX table, with one cell for each row."""

  head: str
  cells: list[str]
  width: float

  def rows(self, first: int, end: int) -> '_Column':
    """Returns the column with only these rows."""
    return self._replace(cells=self.cells[first:end])


def latex(frame: pd.DataFrame, caption: str, command: str, label: str) -> str:
  r"""Returns one or more `table` floats, labelled `tab:<label>`, `tab:<label>-2`, ...

  Rows with the same first label form a group under that label. For a paired metric, a row is compared
  with all rows that differ from it only in the first label. Its mean is bold if it is significantly lower
  than the means of all of them.
  """
  printed = formats.text(frame)
  names = frame.attrs['rows']
  if 'diverged' not in frame and frame['seeds'].nunique() == 1:
    printed = printed.drop(columns='seeds')  # the notes name them
  grouped = len(names) > 1 and bool(frame[names[0]].duplicated().any())
  labels = _labels(printed, names, grouped)
  edges = 2 * SEPARATION  # which @{} leaves out
  taken = sum(column.width + 2 * SEPARATION for column in labels) + INDENT * grouped
  room = COLUMN + edges - taken
  best = {c.heading: frame.attrs['best'].get(c.metric) for c in frame.attrs['columns']}
  values = [
    _value(name, list(printed[name]), best.get(name) or [False] * len(printed), room)
    for name in printed
    if name not in names
  ]
  groups = list(printed[names[0]]) if grouped else []
  notes = _notes(frame)
  room_for_rows = PAGE - LINE * len(_lines(f'{caption} (part 10 of 10, continued)', COLUMN))
  notes_height = SMALL_LINE * len(_lines(notes + command, COLUMN / SMALL))
  parts = list(_parts(values, room))
  tabulars = [
    found
    for part in parts
    for found in _tabulars(
      labels, part, groups, room_for_rows, notes_height if part is parts[-1] else 0
    )
  ]
  below = f'{tex.escaped(notes)} Reproduce: {tex.command(command)}'
  key = 'tab:' + re.sub(r'[^A-Za-z0-9_.:-]+', '-', label)
  floats = []
  for i, (continued, tabular) in enumerate(tabulars):
    which = f'part {i + 1} of {len(tabulars)}' + ', continued' * continued
    floats += [
      '\\begin{table}[t]\n\\centering\\footnotesize',
      f'\\setlength{{\\tabcolsep}}{{{SEPARATION}pt}}',
      f'\\caption{{{tex.escaped(caption)}{f" ({which})" if len(tabulars) > 1 else ""}.}}',
      f'\\label{{{key}{f"-{i + 1}" if i else ""}}}',
      tabular,
    ]
    if i + 1 == len(tabulars):
      floats.append(
        f'\\par\\vspace{{2pt}}\\parbox{{\\linewidth}}{{\\scriptsize\\raggedright {below}}}'
      )
    floats.append('\\end{table}')
  return '\n'.join(floats) + '\n'


def _notes(frame: pd.DataFrame) -> str:
  """Returns the notes of the printed table; if a mean is bold, they explain bold type."""
  notes = formats.notes(frame)
  if not any(map(any, frame.attrs['best'].values())):
    return notes
  return (
    f'{notes} Bold: the mean is lower than that of every row that differs in '
    f'{frame.attrs["rows"][0]} alone, each difference significant at {statistics.ALPHA:.0%} (two-sided '
    "paired t tests after Holm's correction)."
  )


def _labels(printed: pd.DataFrame, names: Sequence[str], grouped: bool) -> list[_Column]:
  """Returns the columns of the labels; words wrap if the columns would take too much of the width."""
  shown = names[1:] if grouped else names
  most = COLUMN * LABELS / len(shown)
  columns = []
  for name in shown:
    head = [*_lines(name, most)]
    if grouped and not columns:
      head = [names[0], *head]  # its values are the headings of groups
    cells = [_lines(value, most) for value in printed[name]]
    width = max(_width(line) for lines in [head, *cells] for line in lines)
    columns.append(_Column(_stacked(head, 'b', 'l'), [_stacked(c, 't', 'l') for c in cells], width))
  return columns


def _value(name: str, values: Sequence[str], bold: Sequence[bool], room: float) -> _Column:
  """Returns a column of numbers; its heading wraps to about the width of the numbers."""
  inner = room - 2 * SEPARATION
  cells = [_lines(value, inner) for value in values]
  widths = [max(map(_width, lines)) * (BOLD if strong else 1) for lines, strong in zip(cells, bold)]
  head = _lines(name, min(inner, max(*widths, NARROWEST)))
  shown = [_stacked(lines, 't', 'r') for lines in cells]
  shown = [rf'\textbf{{{cell}}}' if strong else cell for cell, strong in zip(shown, bold)]
  return _Column(_stacked(head, 'b', 'r'), shown, max(*widths, *map(_width, head)))


def _parts(columns: Sequence[_Column], room: float) -> Iterator[list[_Column]]:
  """Yields groups of consecutive columns; each group has as many columns as fit beside each other."""
  part: list[_Column] = []
  for column in columns:
    if part and sum(c.width + 2 * SEPARATION for c in [*part, column]) > room:
      yield part
      part = []
    part.append(column)
  yield part


def _tabulars(
  labels: Sequence[_Column],
  values: Sequence[_Column],
  groups: Sequence[str],
  room: float,
  notes: float,
) -> Iterator[tuple[bool, str]]:
  """Yields a `tabular` for each page, and whether rows of it are on an earlier page.

  Args:
    labels, values, groups: as in `_tabular`, for all rows.
    room: points for a page's rows and heading.
    notes: points that the notes take on the last page.
  """
  columns = [*labels, *values]
  room -= LINE * (max(_height(column.head) for column in columns) + 3)
  for first, end in _pages(_heights(columns, groups), room, room - notes):
    rows = [[column.rows(first, end) for column in own] for own in (labels, values)]
    yield first > 0, _tabular(*rows, groups[first:end])


def _height(cell: str) -> int:
  """Returns the number of lines of a cell."""
  return cell.count(_BREAK) + 1


def _heights(columns: Sequence[_Column], groups: Sequence[str]) -> list[float]:
  """Returns the height of each row in points, with the heading of the group that it begins."""
  heights = []
  for i in range(len(columns[0].cells)):
    begins = bool(groups) and (i == 0 or groups[i] != groups[i - 1])
    lines = max(_height(column.cells[i]) for column in columns)
    heights.append(LINE * (lines + begins) + 2 * begins)
  return heights


def _pages(heights: Sequence[float], whole: float, last: float) -> Iterator[tuple[int, int]]:
  """Yields the first row of each page and the row after its last one.

  Args:
    heights: height of each row.
    whole: height of the rows of a page.
    last: height of the rows of the last page, which also has the notes.
  """
  first, used = 0, 0.0
  for i, height in enumerate(heights):
    rest = sum(heights[i:])
    full = used + height > whole
    ends = used + rest <= whole and used + rest > last and rest <= last
    if i > first and (full or ends):
      yield first, i
      first, used = i, 0.0
    used += height
  yield first, len(heights)


def _tabular(labels: Sequence[_Column], values: Sequence[_Column], groups: Sequence[str]) -> str:
  """Returns a `tabular`.

  Args:
    labels: columns of labels.
    values: columns of numbers.
    groups: the heading of each row's group, or nothing.
  """
  columns = [*labels, *values]
  start = rf'@{{\hspace{{{INDENT}pt}}}}' if groups else '@{}'
  lines = [
    rf'\begin{{tabular}}{{{start}{"l" * len(labels)}{"r" * len(values)}@{{}}}}',
    r'\toprule',
    ' & '.join(column.head for column in columns) + r' \\',
    r'\midrule',
  ]
  for i in range(len(columns[0].cells)):
    if groups and (i == 0 or groups[i] != groups[i - 1]):
      lines += [r'\addlinespace[2pt]'] if i else []
      lines.append(rf'\multicolumn{{{len(columns)}}}{{@{{}}l}}{{{tex.escaped(groups[i])}}} \\')
    lines.append(' & '.join(column.cells[i] for column in columns) + r' \\')
  return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}'])


def _stacked(lines: Sequence[str], position: str, side: str) -> str:
  """Returns lines of text as LaTeX; several lines are stacked in a `tabular`."""
  if len(lines) == 1:
    return tex.escaped(lines[0])
  body = _BREAK.join(map(tex.escaped, lines))
  return rf'\begin{{tabular}}[{position}]{{@{{}}{side}@{{}}}}{body}\end{{tabular}}'


def _lines(text: str, most: float) -> list[str]:
  """Wraps text into lines of at most `most` points; a longer word is a line of its own."""
  lines = ['']
  for word in text.split():
    longer = f'{lines[-1]} {word}'.strip()
    if lines[-1] and _width(longer) > most:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def _width(text: str) -> float:
  """Returns the width of a line of text in LaTeX's `footnotesize`, in points."""
  return 8.5 * sum(_EM.get(letter, 0.55) for letter in text)
