"""Prints a table of finished runs, of studies or of single workdirs, and draws a figure.

python -m sparse_lm.report results/x/runs.jsonl --rows=method --columns=val_loss
python -m sparse_lm.report results/a results/b
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence

import pandas as pd

from sparse_lm.commands.parser import Parser, local_path, one_line
from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.ranges import Range
from sparse_lm.core.records import JsonObject
from sparse_lm.report import formats, latex, names, plot, results, runs, table


@one_line
def main() -> None:
  """Prints the table and draws the figure if `--figure` is given."""
  arguments = _arguments()
  lines = runs.read(arguments.paths, _asked(arguments))
  baseline = _baseline(lines, arguments.baseline)
  rows = _names(arguments.rows) or results.label_names(lines)
  present = results.metric_names(lines)
  columns = (
    _names(arguments.columns) or [c.metric for c in table.COLUMNS if c.metric in present] or present
  )
  margins = _margins(arguments.margin, columns, baseline)
  chosen = [table.with_margin(table.column(name), margins.get(name, 0.0)) for name in columns]
  frame = table.summarise(lines, rows, chosen, baseline)
  if arguments.figure:
    _draw(arguments, lines, baseline)
  print(_formatted(frame, arguments.format, lines))


def _arguments() -> argparse.Namespace:
  parser = Parser('python -m sparse_lm.report')
  parser.add_argument(
    'paths',
    type=local_path,
    nargs='+',
    help='runs.jsonl of studies, workdirs or result.json of single runs',
  )
  parser.add_argument(
    '--rows',
    default='',
    help='labels or config fields that make a row, such as weight.sparsity; default: all labels',
  )
  parser.add_argument('--columns', default='', help='metrics; default: those of `sparse_lm.train`')
  parser.add_argument(
    '--baseline', default='', help='label=value[,...] of the rows that the others are compared with'
  )
  parser.add_argument(
    '--margin',
    default='',
    help='metric=value[,...]: test whether rows differ from the baseline by less than the value',
  )
  parser.add_argument('--format', choices=('markdown', 'csv', 'latex'), default='markdown')
  parser.add_argument(
    '--figure', type=local_path, help='path that ends in .png or .pdf; both files are written'
  )
  parser.add_argument('--x', help='label or metric on the x axis of the figure')
  parser.add_argument('--y', help='metric on the y axis of the figure')
  parser.add_argument('--series', help='label with a curve for each value in the figure')
  arguments = parser.parse_args()
  if arguments.figure and not (arguments.x and arguments.y and arguments.series):
    parser.error('--figure needs --x, --y and --series')
  return arguments


def _asked(arguments: argparse.Namespace) -> list[str]:
  """Returns the labels that --rows and --baseline name."""
  baseline = [item.partition('=')[0] for item in _names(arguments.baseline) if '=' in item]
  return [*_names(arguments.rows), *baseline]


def _formatted(frame: pd.DataFrame, kind: str, lines: list[results.Line]) -> str:
  if kind == 'csv':
    return formats.csv(frame).rstrip()
  studies = list(dict.fromkeys(line.get('study', 'runs') for line in lines))
  caption = ', '.join(studies)
  command = shlex.join(['python', '-m', 'sparse_lm.report', *sys.argv[1:]])
  if kind == 'latex':
    return latex.latex(frame, caption, command, '-'.join(studies)).rstrip()
  return formats.markdown(frame, caption, command).rstrip()


def _draw(
  arguments: argparse.Namespace, lines: list[results.Line], baseline: JsonObject | None
) -> None:
  path = pathlib.Path(arguments.figure)
  if path.suffix not in ('.png', '.pdf'):
    raise UserError(f'--figure={path} is not valid; valid: a path that ends in .png or .pdf')
  figure = plot.curves(lines, arguments.x, arguments.y, arguments.series, baseline)
  for written in plot.save(figure, path.parent, path.stem):
    print(f'wrote {written}', file=sys.stderr)


def _names(text: str) -> list[str]:
  return [name.strip() for name in text.split(',') if name.strip()]


def _baseline(lines: list[results.Line], text: str) -> JsonObject | None:
  """Parses `method=dense,sparsity=0` into labels with the values that the lines have."""
  labels: JsonObject = {}
  for item in _names(text):
    name, equals, value = item.partition('=')
    if not equals:
      raise UserError(f'--baseline={text} is not valid; valid: label=value[,label=value ...]')
    if name not in results.label_names(lines):
      raise unknown('label', name, results.label_names(lines))
    found = (line['labels'].get(name) for line in lines)
    values = {names.label_text(value): value for value in found}
    if value not in values:
      raise unknown(f'value of label {name!r}:', value, values)
    labels[name] = values[value]
  return labels or None


def _margins(text: str, columns: Sequence[str], baseline: JsonObject | None) -> dict[str, float]:
  """Parses `val_loss=0.02` into margins by metric."""
  margins = {}
  for item in _names(text):
    name, equals, value = item.partition('=')
    if not equals:
      raise UserError(f'--margin={text} is not valid; valid: metric=value[,metric=value ...]')
    if name not in columns:
      raise unknown('metric of the table', name, columns)
    if table.column(name).is_time:
      raise UserError(f'--margin={item}: {name} is a time, and times are not compared')
    try:
      margins[name] = float(value)
    except ValueError:
      raise UserError(f'--margin={item}: {value!r} is not a number') from None
    Range(float, '(0, inf)').require(f'--margin={name}', margins[name])
  if margins and baseline is None:
    raise UserError('--margin needs a --baseline=label=value to compare with')
  return margins


if __name__ == '__main__':
  main()
