"""Figures with one row for each value of a label: bars of ratios, and dots with error bars."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from sparse_lm.core.records import Json
from sparse_lm.report import plot, results, style
from sparse_lm.report.names import display
from sparse_lm.report.table import Column, column


def bars(
  lines: Sequence[results.Line],
  label: str | Column,
  width: Column,
  low: str,
  high: str,
  group: str,
) -> Figure:
  """Returns a figure with a horizontal bar for each value of `label` and `group`, and a line at ratio 1.

  Args:
    label: the label with one row for each value. A `Column` gives the axis its title and unit.
    width: the metric that the bars show: the median of a ratio.
    low, high: the metrics at the ends of the error bars: the quartiles of the ratio.
    group: the label with one colour for each value.
  """
  label = column(label)
  rows = list(dict.fromkeys(line['labels'][label.metric] for line in lines))
  groups = list(dict.fromkeys(line['labels'][group] for line in lines))
  in_row = {row: [i for i in lines if i['labels'][label.metric] == row] for row in rows}
  with matplotlib.rc_context(style.RC):
    texts = [textwrap.fill(display(row), 30) for row in rows]
    most = max(len(members) for members in in_row.values())
    row_height = max(0.06 + 0.13 * most, 0.04 + 0.12 * max(text.count('\n') + 1 for text in texts))
    figure = style.figure(0.5 + row_height * len(rows))
    axes = figure.add_subplot()
    for place, members in enumerate(in_row.values()):
      for i, line in enumerate(members):
        value, *ends = (line['metrics'][metric] for metric in (width.metric, low, high))
        look = style.SERIES[groups.index(line['labels'][group])]
        bar = axes.barh(
          place + 0.8 * ((i + 0.5) / len(members) - 0.5),
          value,
          xerr=[[value - ends[0]], [ends[1] - value]],
          color='white' if look.hatch else look.colour,
          edgecolor=look.colour,
          hatch=look.hatch,
          height=0.72 / len(members),
          error_kw={'ecolor': 'black', **style.ERROR_BARS},
        )
        shown = axes.bar_label(bar, fmt='{:.2f}', padding=3, fontsize=7)
        shown[0].set_path_effects([withStroke(linewidth=2, foreground='white')])
    axes.margins(x=0.14)
    even = style.ratio_of_1(axes, vertical=True)
    axes.set_yticks(range(len(rows)), texts)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis='y')
    letters = max(len(part) for text in texts for part in text.split('\n'))
    axes.set(xlabel=textwrap.fill(width.heading, 58 - letters), ylabel=label.heading)
    handles = [style.patch(display(name), style.SERIES[i]) for i, name in enumerate(groups)]
    style.legend(figure, [*handles, even, style.error_bar('median and quartiles')], title=group)
  return figure


def dots(
  lines: Sequence[results.Line],
  category: str,
  x: str | Column | Sequence[str | Column],
  series: str,
  baseline: Mapping[str, Json] | None = None,
  panel: str = '',
  targets: Mapping[str, float] | None = None,
) -> Figure:
  """Draws metrics as dots, one row for each value of a label: means over seeds ± standard deviations.

  Args:
    lines: the lines of a study; panels, categories and series are in order of first appearance.
    category: the label with one row for each value.
    x: a metric, or several metrics; each has its own column of panels.
    series: the label with one colour and marker for each value, at most six.
    baseline: labels of the rows that are drawn as vertical lines, not as dots. If `panel` is given, a
      line is in the panel of its own value; a row without the label `panel` has a line in all panels.
    panel: the label with a panel for each value, one below the other.
    targets: for some metrics, the value that a dotted line marks.

  Raises:
    UserError: a label or metric is unknown, no run has the labels of the baseline, or the runs of a point
      differ in more than their seed.
  """
  asked = [x] if isinstance(x, str | Column) else x
  xs = [column(axis) for axis in asked]
  for axis in xs:
    results.check_metric(lines, axis.metric)
  dense, rest = plot.split(lines, baseline)
  names = [panel, series, category] if panel else [series, category]
  groups = {key[-3:]: members for key, members in results.group(rest, names).items()}
  groups = {key if panel else (None, *key): members for key, members in groups.items()}
  titles, looks, _ = (list(dict.fromkeys(key[i] for key in groups)) for i in range(3))
  rows = {
    title: list(dict.fromkeys(key[2] for key in groups if key[0] == title)) for title in titles
  }
  with matplotlib.rc_context(style.RC):
    total = sum(map(len, rows.values()))
    figure = style.figure(0.4 + 0.22 * len(titles) + (0.08 + 0.07 * len(looks)) * total)
    heights = [len(row) + 0.2 for row in rows.values()]
    grid = figure.subplots(len(titles), len(xs), sharex='col', squeeze=False, height_ratios=heights)
    handles: plot.Handles = {}
    for title, panels in zip(titles, grid):
      own = {key[1:]: members for key, members in groups.items() if key[0] == title}
      twins = [line for line in dense if line['labels'].get(panel, title) == title]
      for axes, axis in zip(panels, xs):
        handles |= _draw_dots(axes, own, looks, rows[title], axis)
        handles |= _draw_twins(axes, twins, axis, (targets or {}).get(axis.metric))
        axes.tick_params(labelleft=axes is panels[0])
      if panel:
        panels[0].set_title(display(title), loc='left', fontweight='bold')
    for axes, axis in zip(grid[-1], xs):
      axes.set_xlabel(textwrap.fill(axis.heading, 46 // len(xs)))
    handles |= plot.spread(lines, xs[0])
    style.legend(figure, list(handles.values()))
  return figure


def _draw_dots(
  axes: Axes,
  groups: Mapping[results.Key, list[results.Line]],
  looks: Sequence[Json],
  categories: Sequence[Json],
  x: Column,
) -> plot.Handles:
  """Draws a dot for each series in the row of each category; the dots of a row are a little apart."""
  handles: plot.Handles = {}
  for index, name in enumerate(looks):
    look = style.SERIES[index]
    points = {
      key[1]: plot.mean_std(members, x) for key, members in groups.items() if key[0] == name
    }
    apart = 0.66 * ((index + 0.5) / len(looks) - 0.5)
    axes.errorbar(
      [mean for mean, _ in points.values()],
      [categories.index(value) + apart for value in points],
      xerr=[0.0 if math.isnan(std) else std for _, std in points.values()],
      label=display(name),
      **style.marked(look, joined=False),
    )
    handles[display(name)] = style.handle(display(name), look, joined=False)
  axes.set_yticks(range(len(categories)), [textwrap.fill(display(v), 24) for v in categories])
  axes.set_ylim(len(categories) - 0.4, -0.6)
  return handles


def _draw_twins(
  axes: Axes, lines: Sequence[results.Line], x: Column, target: float | None
) -> plot.Handles:
  """Draws a vertical line at the mean of the dense twin, and one at the target."""
  handles: plot.Handles = {}
  if lines:
    mean, _ = plot.mean_std(lines, x)
    handles['dense'] = axes.axvline(mean, label='dense', **style.reference('--'))
  if target is not None:
    handles['target'] = axes.axvline(target * x.scale, label='target', **style.reference(':'))
  return handles
