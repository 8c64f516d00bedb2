"""Figures over seeds: a metric against a label or another metric, one line for each series.

Figures are made without pyplot, so nothing is shared between them and no display is needed; in a
notebook `%matplotlib inline` shows one that a cell returns.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import Json
from sparse_lm.report import results, statistics
from sparse_lm.report.formats import label_text
from sparse_lm.report.table import Column, column

# Okabe and Ito's colours, which stay distinct under the common forms of colour blindness; the
# markers stay distinct in black and white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
LINES = ('-', '--', ':')  # for another round of colours
BASELINES = ('--', ':', '-.')
STYLE = {
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.edgecolor': '#444444',
  'grid.color': '#e4e4e4',
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'pdf.fonttype': 42,  # fonts that journals accept and editors can edit
}


class _Point(NamedTuple):
  x: float
  x_std: float
  y: float
  y_std: float


def curves(
  lines: Sequence[results.Line],
  x: str | Column,
  y: str | Column,
  series: str,
  baseline: Mapping[str, Json] | None = None,
) -> Figure:
  """`y` over `x`: mean over seeds, with the sample standard deviation as error bars.

  Args:
    lines: of a study; series are drawn in order of first appearance.
    x: a label with numbers, or a metric. A `Column` gives the axis its title, unit and scale.
    y: a metric.
    series: the label with one curve for each value.
    baseline: labels of the row(s) drawn as horizontal lines with a ± std band instead.

  Raises:
    UserError: an unknown label or metric, an `x` that is no number, no run with the baseline's
      labels, or a point that mixes runs that differ in more than their seed.
  """
  x, y = (column(axis) if isinstance(axis, str) else axis for axis in (x, y))
  results.check_metric(lines, y.metric)
  dense = [line for line in lines if baseline and results.matches(line, baseline)]
  if baseline and not dense:
    raise UserError(f'no run has the labels of the baseline {dict(baseline)}')
  rest = [line for line in lines if not (baseline and results.matches(line, baseline))]
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.4, 3.6), layout='constrained')
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(_series(rest, x, y, series).items()):
      _draw_series(axes, index, name, points)
    _draw_baselines(axes, dense, y, series)
    axes.set(xlabel=x.heading, ylabel=y.heading)
    figure.legend(loc='outside right center', title=series, alignment='left')
  return figure


def bars(
  lines: Sequence[results.Line], label: str, width: Column, low: str, high: str, group: str
) -> Figure:
  """A horizontal bar for each value of `label`, coloured by `group`, with a marked 1.

  Args:
    width: the metric that a bar shows.
    low, high: metrics of the ends of its error bar (quartiles, say).
  """
  groups = list(dict.fromkeys(line['labels'][group] for line in lines))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.4, 0.8 + 0.32 * len(lines)), layout='constrained')
    axes = figure.add_subplot()
    for place, line in enumerate(lines):
      value, *ends = (line['metrics'][metric] for metric in (width.metric, low, high))
      bar = axes.barh(
        place,
        value,
        xerr=[[value - ends[0]], [ends[1] - value]],
        color=COLOURS[groups.index(line['labels'][group])],
        height=0.65,
        capsize=2.5,
      )
      axes.bar_label(bar, fmt='{:.2f}', padding=4)
    axes.margins(x=0.1)
    axes.axvline(1.0, color='#555555', linestyle='--', linewidth=1.2)
    axes.set_yticks(range(len(lines)), [label_text(line['labels'][label]) for line in lines])
    axes.invert_yaxis()
    axes.set(xlabel=width.heading)
    handles = [Patch(color=COLOURS[i], label=label_text(name)) for i, name in enumerate(groups)]
    figure.legend(handles=handles, loc='outside lower center', title=group, ncols=len(groups))
  return figure


def dots(
  lines: Sequence[results.Line],
  category: str,
  x: str | Column,
  series: str,
  baseline: Mapping[str, Json] | None = None,
) -> Figure:
  """`x` for each value of a label, from top to bottom: mean over seeds with the sample deviation.

  Args:
    lines: of a study; categories and series come in order of first appearance.
    x: a metric.
    series: the label with one colour for each value.
    baseline: labels of the row drawn as a vertical line instead.

  Raises:
    UserError: an unknown label or metric, no run with the baseline's labels, or a point that mixes
      runs that differ in more than their seed.
  """
  x = column(x) if isinstance(x, str) else x
  results.check_metric(lines, x.metric)
  dense = [line for line in lines if baseline and results.matches(line, baseline)]
  if baseline and not dense:
    raise UserError(f'no run has the labels of the baseline {dict(baseline)}')
  rest = [line for line in lines if line not in dense]
  groups = results.group(rest, [series, category])
  names, categories = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(6.4, 1.0 + 0.3 * len(categories)), layout='constrained')
    axes = figure.add_subplot()
    for index, name in enumerate(names):
      points = {key[1]: _mean_std(members, x) for key, members in groups.items() if key[0] == name}
      # Series stand a little apart, so that none hides another.
      apart = 0.5 * (index + 0.5 - len(names) / 2) / len(names)
      axes.errorbar(
        [mean for mean, _ in points.values()],
        [categories.index(value) + apart for value in points],
        xerr=[0.0 if math.isnan(std) else std for _, std in points.values()],
        label=label_text(name),
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle='none',
        markersize=5.5,
        capsize=2.5,
      )
    if dense:
      mean, _ = _mean_std(dense, x)
      axes.axvline(mean, color='#555555', linestyle='--', linewidth=1.4, label='dense', zorder=1)
    axes.set_yticks(range(len(categories)), [label_text(value) for value in categories])
    axes.invert_yaxis()
    axes.set(xlabel=x.heading)
    figure.legend(loc='outside right center', title=series, alignment='left')
  return figure


def fronts(
  lines: Sequence[results.Line], costs: Sequence[str | Column], y: str | Column, series: str
) -> Figure:
  """`y` against each cost in a panel of its own, the Pareto front of the means drawn in grey.

  Points are means over seeds with the sample standard deviation as error bars; a point is on the front
  if no other has a lower cost and a lower `y`.

  Args:
    lines: of a study; series come in order of first appearance.
    costs: metrics, less is better.
    y: a metric, less is better.
    series: the label with one colour and marker for each value.

  Raises:
    UserError: an unknown label or metric, or a point that mixes runs that differ in more than their seed.
  """
  *costs, y = (column(axis) if isinstance(axis, str) else axis for axis in (*costs, y))
  results.check_metric(lines, y.metric)
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.2 * len(costs) + 2.2, 4.4), layout='constrained')
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, costs):
      found = _series(lines, cost, y, series)
      for index, (name, points) in enumerate(found.items()):
        _draw_series(axes, index, name, points, joined=False)
      front = _front([point for points in found.values() for point in points])
      x, heights = [p.x for p in front], [p.y for p in front]
      axes.step(x, heights, where='post', color='#999999', linewidth=1.4, zorder=1)
      axes.set(xlabel=cost.heading)
    panels[0].set(ylabel=y.heading)
    handles = [*panels[0].get_legend_handles_labels()[0], Line2D([], [], color='#999999')]
    figure.legend(
      handles=handles,
      labels=[*found, 'Pareto front'],
      loc='outside right center',
      title=series,
      alignment='left',
    )
  return figure


def save(figure: Figure, folder: str | pathlib.Path, name: str) -> list[pathlib.Path]:
  """Writes `<name>.png` (160 dpi) and `<name>.pdf` in `folder`, made where it is missing."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = []
  # Without a date the same numbers give the same file.
  for kind, metadata in (('png', {}), ('pdf', {'CreationDate': None})):
    temporary = folder / f'{name}.{os.getpid()}.tmp'
    with matplotlib.rc_context(STYLE):
      figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
    written.append(folder / f'{name}.{kind}')
    os.replace(temporary, written[-1])
  return written


def _series(
  lines: Sequence[results.Line], x: Column, y: Column, series: str
) -> dict[str, list[_Point]]:
  """The points of each series, from left to right."""
  labels = results.label_names(lines)
  by_label = x.metric in labels
  if not by_label and x.metric not in results.metric_names(lines):
    raise unknown('label or metric', x.metric, [*labels, *results.metric_names(lines)])
  # On a metric's axis every setting is a point of its own.
  names = [series, x.metric] if by_label else [series, *(n for n in labels if n != series)]
  curves: dict[str, list[_Point]] = {}
  for key, members in results.group(lines, names).items():
    name = label_text(key[0])
    position = _label_position(key[1], x, name) if by_label else _mean_std(members, x)
    point = _Point(*position, *_mean_std(members, y))
    if math.isfinite(point.x) and math.isfinite(point.y):  # not of runs that diverged
      curves.setdefault(name, []).append(point)
  return {name: sorted(points) for name, points in curves.items()}


def _front(points: Sequence[_Point]) -> list[_Point]:
  """Those that no other beats on both axes, from left to right."""
  front: list[_Point] = []
  for point in sorted(points, key=lambda p: (p.x, p.y)):
    if not front or point.y < front[-1].y:
      front.append(point)
  return front


def _label_position(value: Json, x: Column, name: str) -> tuple[float, float]:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(
      f'label {x.metric!r} of series {name} is {value!r}, not a number; draw it as the baseline, '
      'or leave it out'
    )
  return value * x.scale, math.nan


def _mean_std(members: Sequence[results.Line], axis: Column) -> tuple[float, float]:
  mean, std = statistics.mean_std(list(results.by_seed(members, axis.metric).values()))
  return mean * axis.scale, std * axis.scale


def _draw_series(
  axes: Axes, index: int, name: str, points: Sequence[_Point], joined: bool = True
) -> None:
  x, x_std, y, y_std = zip(*points)
  again = index // len(COLOURS)  # another round of colours, with other markers and lines
  axes.errorbar(
    x,
    y,
    yerr=y_std if any(std > 0 for std in y_std) else None,
    xerr=x_std if any(std > 0 for std in x_std) else None,
    label=name,
    color=COLOURS[index % len(COLOURS)],
    marker=MARKERS[(index + again) % len(MARKERS)],
    linestyle=LINES[again % len(LINES)] if joined else 'none',
    linewidth=1.6,
    markersize=5.5,
    markeredgecolor='white',
    markeredgewidth=0.6,
    elinewidth=1.1,
    capsize=2.5,
  )


def _draw_baselines(
  axes: Axes,
  lines: Sequence[results.Line],
  y: Column,
  series: str,
) -> None:
  """A line for each dense twin, named like a series and by what else tells the twins apart."""
  labels = results.label_names(lines)
  groups = results.group(lines, labels)
  shown = [
    i for i, label in enumerate(labels) if label == series or len({key[i] for key in groups}) > 1
  ]
  for index, (key, members) in enumerate(groups.items()):
    mean, std = _mean_std(members, y)
    style = {'color': '#555555', 'zorder': 1}
    name = ' '.join(label_text(key[i]) for i in shown)
    axes.axhline(
      mean, linestyle=BASELINES[index % len(BASELINES)], linewidth=1.4, label=name, **style
    )
    if not math.isnan(std):
      axes.axhspan(mean - std, mean + std, alpha=0.15, linewidth=0, **style)
