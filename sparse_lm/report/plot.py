"""Figures over seeds: a metric against a label or another metric, one curve for each series.

Figures have the width of one column of a paper. They are made without pyplot, so they share no state and
need no display. A notebook with `%matplotlib inline` shows a figure that a cell returns.
"""

import itertools
import math
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.core.records import Json
from sparse_lm.report import results, statistics, style
from sparse_lm.report.names import display
from sparse_lm.report.table import Column, column

DPI = 240  # of PNG files
Handles = dict[str, Artist]  # entries of a legend by their text


class _Point(NamedTuple):
  x: float
  x_std: float
  y: float
  y_std: float


Curves = dict[str, list[_Point]]


def curves(
  lines: Sequence[results.Line],
  x: str | Column,
  y: str | Column,
  series: str,
  baseline: Mapping[str, Json] | None = None,
  reference: Sequence[Json] = (),
  front: bool = False,
) -> Figure:
  """Draws `y` over `x`: means over seeds, with the sample standard deviation as error bars.

  Up to six series share one panel. More series get a panel each, which shows the points of all other
  series in grey. On an axis whose unit begins with ×, a line marks the ratio 1.

  Args:
    lines: the lines of a study; series are drawn in order of first appearance.
    x: a label with numbers, or a metric. A `Column` gives the axis its title, unit and scale.
    y: a metric.
    series: the label with one curve for each value.
    baseline: labels of the rows that are drawn as horizontal lines with a ± std band, not as curves.
    reference: values of `series` whose curves are drawn in every panel.
    front: whether to draw the Pareto front of all means (less is better on both axes) instead of curves.

  Raises:
    UserError: a label or metric is unknown, a value of `x` is not a number, no run has the labels of the
      baseline, or the runs of a point differ in more than their seed.
  """
  x, y = column(x), column(y)
  results.check_metric(lines, y.metric)
  dense, rest = split(lines, baseline)
  found = _series(rest, x, y, series)
  with matplotlib.rc_context(style.RC):
    if len(found) <= len(style.SERIES):
      figure, handles = _one_panel(found, not front, aside=x.metric in results.label_names(rest))
    else:
      figure, handles = _panels(found, not front, [display(name) for name in reference], series)
    for axes in figure.axes:
      if front:
        handles |= _draw_front(axes, found)
      handles |= _draw_baselines(axes, dense, y, series)
      handles |= _draw_ratio_of_1(axes, x, y)
    handles |= spread([*dense, *rest], y)
    _label(figure, x, y)
    style.legend(figure, list(handles.values()), above=len(figure.axes) > 1)
  return figure


def save(figure: Figure, folder: str | pathlib.Path, name: str) -> list[pathlib.Path]:
  """Writes `<name>.png` (240 dpi) and `<name>.pdf` to `folder`, which is created if it is missing."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = []
  # The date is left out, so that the same numbers give the same file.
  for kind, metadata in (('png', {}), ('pdf', {'CreationDate': None})):
    temporary = folder / f'{name}.{os.getpid()}.tmp'
    with matplotlib.rc_context(style.RC):
      figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
    written.append(folder / f'{name}.{kind}')
    os.replace(temporary, written[-1])
  return written


def split(
  lines: Sequence[results.Line], baseline: Mapping[str, Json] | None
) -> tuple[list[results.Line], list[results.Line]]:
  """Splits lines into those of the baseline and all others."""
  dense = [line for line in lines if baseline and results.matches(line, baseline)]
  if baseline and not dense:
    raise UserError(f'no run has the labels of the baseline {dict(baseline)}')
  return dense, [line for line in lines if not (baseline and results.matches(line, baseline))]


def _series(lines: Sequence[results.Line], x: Column, y: Column, series: str) -> Curves:
  """Returns the points of each series, from left to right, by the display name of the series."""
  labels = results.label_names(lines)
  by_label = x.metric in labels
  if not by_label and x.metric not in results.metric_names(lines):
    raise unknown('label or metric', x.metric, [*labels, *results.metric_names(lines)])
  # If `x` is a metric, each combination of labels is one point.
  names = [series, x.metric] if by_label else [series, *(n for n in labels if n != series)]
  found: Curves = {}
  for key, members in results.group(lines, names).items():
    name = display(key[0])
    position = _label_position(key[1], x, name) if by_label else mean_std(members, x)
    point = _Point(*position, *mean_std(members, y))
    if math.isfinite(point.x) and math.isfinite(point.y):  # runs that diverged have no point
      found.setdefault(name, []).append(point)
  return {name: sorted(points) for name, points in found.items()}


def _label_position(value: Json, x: Column, name: str) -> tuple[float, float]:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(
      f'label {x.metric!r} of series {name} is {value!r}, not a number; draw it as the baseline, '
      'or leave it out'
    )
  return value * x.scale, math.nan


def mean_std(members: Sequence[results.Line], axis: Column) -> tuple[float, float]:
  mean, std = statistics.mean_std(list(results.by_seed(members, axis.metric).values()))
  return mean * axis.scale, std * axis.scale


def _one_panel(found: Curves, joined: bool, aside: bool) -> tuple[Figure, Handles]:
  """Draws all series in one panel; `aside` shifts them, so that points at the same `x` do not overlap."""
  figure = style.figure(2.3)
  axes = figure.add_subplot()
  handles: Handles = {}
  for index, (name, points) in enumerate(found.items()):
    look = style.SERIES[index]
    drawn = _draw_points(axes, points, label=name, **style.marked(look, joined))
    if aside and any(point.y_std > 0 for points in found.values() for point in points):
      distance = 2.2 * (index - (len(found) - 1) / 2)
      for artist in drawn.get_children():
        artist.set_transform(offset_copy(axes.transData, figure, x=distance, units='points'))
    handles[name] = style.handle(name, look, joined)
  positions = sorted({point.x for points in found.values() for point in points})
  gaps = [b - a for a, b in itertools.pairwise(positions)]
  if aside and gaps and min(gaps) > 0.1 * (positions[-1] - positions[0]):
    axes.set_xticks(positions)
  return figure, handles


def _panels(
  found: Curves, joined: bool, reference: Sequence[str], series: str
) -> tuple[Figure, Handles]:
  """Draws a panel for each series that is no reference, with the points of all others in grey."""
  own = {name: points for name, points in found.items() if name not in reference}
  columns, rows = 3, math.ceil(len(own) / 3)
  figure = style.figure(0.3 + 0.88 * rows)
  panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
  grey = {'color': style.CONTEXT, 'marker': 'o', 'linestyle': 'none', 'markersize': 1.8}
  look = style.SERIES[0]
  for axes, (name, points) in zip(panels, own.items()):
    others = [point for other in own if other != name for point in own[other]]
    axes.plot([p.x for p in others], [p.y for p in others], zorder=1, **grey)
    for line, each in zip(style.REFERENCE_LINES[1:], reference):
      drawn = sorted(found.get(each, []))
      axes.plot([p.x for p in drawn], [p.y for p in drawn], **style.reference(line), label=each)
    _draw_points(axes, points, label=name, **style.marked(look, joined) | {'markersize': 3})
    axes.set_title(textwrap.fill(name, 19), pad=2, fontsize=7)
  for unused in panels[len(own) :]:
    unused.remove()
  for axes in panels[max(0, len(own) - columns) : len(own)]:
    axes.tick_params(labelbottom=True)
  handles: Handles = {'own': style.handle(f'this {series}', look, joined)}
  handles['others'] = Line2D([], [], **grey, label='all others')
  handles |= {
    each: Line2D([], [], **style.reference(line), label=each)
    for line, each in zip(style.REFERENCE_LINES[1:], reference)
  }
  return figure, handles


def _draw_points(axes: Axes, points: Sequence[_Point], **look: object) -> ErrorbarContainer:
  x, x_std, y, y_std = zip(*points)
  return axes.errorbar(
    x,
    y,
    yerr=y_std if any(std > 0 for std in y_std) else None,
    xerr=x_std if any(std > 0 for std in x_std) else None,
    **look,
  )


def _draw_front(axes: Axes, found: Curves) -> Handles:
  """Draws the Pareto front, the points that no other point beats on both axes, as a step curve."""
  front: list[_Point] = []
  for point in sorted((p for points in found.values() for p in points), key=lambda p: (p.x, p.y)):
    if not front or point.y < front[-1].y:
      front.append(point)
  label = 'Pareto front'
  (line,) = axes.step(
    [p.x for p in front], [p.y for p in front], where='post', label=label, **style.reference('-')
  )
  return {label: line}


def _draw_baselines(axes: Axes, lines: Sequence[results.Line], y: Column, series: str) -> Handles:
  """Draws a line for each baseline. Its name is the series and the labels in which baselines differ."""
  if not lines:
    return {}
  labels = results.label_names(lines)
  groups = results.group(lines, labels)
  shown = [
    i for i, label in enumerate(labels) if label == series or len({key[i] for key in groups}) > 1
  ]
  handles: Handles = {}
  for index, (key, members) in enumerate(groups.items()):
    mean, std = mean_std(members, y)
    name = ' '.join(display(key[i]) for i in shown)
    look = style.reference(style.REFERENCE_LINES[index % len(style.REFERENCE_LINES)])
    handles[name] = axes.axhline(mean, label=name, **look)
    if not math.isnan(std):
      axes.axhspan(mean - std, mean + std, color=style.REFERENCE, alpha=0.15, linewidth=0, zorder=1)
  return handles


def _draw_ratio_of_1(axes: Axes, x: Column, y: Column) -> Handles:
  handles: Handles = {}
  for axis, vertical in ((x, True), (y, False)):
    if axis.unit.startswith('×'):
      handles['ratio'] = style.ratio_of_1(axes, vertical)
  return handles


def spread(lines: Sequence[results.Line], y: Column) -> Handles:
  """Returns the legend entry that explains error bars and bands; empty for one seed."""
  rows = results.group(lines, results.label_names(lines)).values()
  seeds = sorted({len(results.by_seed(members, y.metric)) for members in rows} - {0})
  if not seeds or seeds[-1] == 1:
    return {}
  count = f'{seeds[0]}' if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]}'
  return {'spread': style.error_bar(f'mean ± std, {count} seeds')}


def _label(figure: Figure, x: Column, y: Column) -> None:
  """Labels the axes: those of a single panel, or once for all panels."""
  if len(figure.axes) == 1:
    figure.axes[0].set(xlabel=x.heading, ylabel=y.heading)
  else:
    figure.supxlabel(x.heading, fontsize=7.5)
    figure.supylabel(y.heading, fontsize=7.5)
