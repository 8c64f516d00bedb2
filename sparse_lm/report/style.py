"""The look of all figures: sizes for a column of a paper, one palette, and legends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerLine2D
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

# Inches: one column of a paper with two. Text of 7 points is readable there.
WIDTH = 3.3
REFERENCE = '#444444'  # lines that series are compared with
CONTEXT = '#bdbdbd'  # points of the series that other panels show


Line = str | tuple[int, tuple[float, ...]]


class Series(NamedTuple):
  """The look of one series of a panel, distinct from the others even when it is printed in grey.

  Attributes:
    line: Matplotlib's line style.
    face: fill colour of the marker; white if the marker is an outline.
  """

  colour: str
  marker: str
  line: Line
  face: str
  hatch: str


# Okabe and Ito's colours stay distinct under the common forms of colour blindness. Their greys do not all
# stay distinct, so each has its own marker, line style and hatch.
SERIES = (
  Series('#0072B2', 'o', '-', '#0072B2', ''),
  Series('#E69F00', 's', (0, (4, 1.5)), 'white', '///'),
  Series('#009E73', '^', (0, (6, 1.5, 1.5, 1.5)), '#009E73', '....'),
  Series('#CC79A7', 'D', (0, (1.5, 1.2)), 'white', '\\\\\\'),
  Series('#000000', 'v', (0, (9, 2)), '#000000', 'xxxx'),
  Series('#D55E00', 'X', (0, (3, 1, 1, 1, 1, 1)), 'white', '++++'),
)
_ERROR_BAR = 'error bar'
REFERENCE_LINES = ('--', '-.', (0, (7, 1, 1, 1, 1, 1)))
RC = {
  'font.size': 7.5,
  'axes.titlesize': 7.5,
  'axes.labelsize': 7.5,
  'xtick.labelsize': 7,
  'ytick.labelsize': 7,
  'legend.fontsize': 7,
  'legend.title_fontsize': 7,
  'legend.frameon': False,
  'legend.handlelength': 2.6,
  'legend.columnspacing': 1.2,
  'legend.borderaxespad': 0.2,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.edgecolor': '#444444',
  'axes.linewidth': 0.6,
  'xtick.major.width': 0.6,
  'ytick.major.width': 0.6,
  'grid.color': '#e4e4e4',
  'grid.linewidth': 0.5,
  'hatch.linewidth': 0.6,
  'pdf.fonttype': 42,  # fonts that journals accept and editors can edit
}
ERROR_BARS = {'elinewidth': 0.8, 'capsize': 1.8, 'capthick': 0.8}
MARKERS = {'markersize': 4.2, 'markeredgewidth': 0.9, 'linewidth': 1.2}


def figure(height: float, width: float = WIDTH) -> Figure:
  """Returns an empty figure, by default of one column's width; callers draw within `rc_context(RC)`."""
  return Figure(figsize=(width, height), layout='constrained')


def marked(series: Series, joined: bool = True) -> dict[str, object]:
  """Returns the arguments of `Axes.errorbar` for a series."""
  return {
    'color': series.colour,
    'marker': series.marker,
    'linestyle': series.line if joined else 'none',
    'markerfacecolor': series.face,
    'markeredgecolor': series.colour,
    **MARKERS,
    **ERROR_BARS,
  }


def handle(label: str, series: Series, joined: bool = True) -> Line2D:
  """Returns the legend entry of a series, without its error bars."""
  style = {name: value for name, value in marked(series, joined).items() if name not in ERROR_BARS}
  return Line2D([], [], label=label, **style)


def patch(label: str, series: Series) -> Patch:
  """Returns the legend entry of a series of bars."""
  face = 'white' if series.hatch else series.colour
  return Patch(facecolor=face, edgecolor=series.colour, hatch=series.hatch, label=label)


def error_bar(label: str) -> Line2D:
  """Returns the legend entry that explains error bars."""
  return Line2D(
    [], [], label=label, color=REFERENCE, linewidth=0.8, marker='|', markersize=4, gid=_ERROR_BAR
  )


def reference(line: Line) -> dict[str, object]:
  """Returns the plot arguments of a reference line, which series are compared with."""
  return {'color': REFERENCE, 'linestyle': line, 'linewidth': 1.0, 'zorder': 1}


def ratio_of_1(axes: Axes, vertical: bool) -> Line2D:
  """Draws a line at the ratio 1, and returns it for the legend."""
  draw = axes.axvline if vertical else axes.axhline
  return draw(1.0, color='black', linestyle='-', linewidth=0.7, zorder=1, label='ratio of 1')


def legend(figure: Figure, handles: Sequence[Artist], title: str = '', above: bool = False) -> None:
  """Adds a legend below or above all panels; the figure grows by the legend's height."""
  columns = next(n for n in range(len(handles), 0, -1) if n == 1 or _fits(figure, handles, n))
  rows = math.ceil(len(handles) / columns) + bool(title)
  figure.set_figheight(figure.get_figheight() + 0.08 + 0.15 * rows)
  figure.legend(
    handles=handles,
    loc=f'outside {"upper" if above else "lower"} center',
    ncols=columns,
    title=title or None,
    # An error bar has caps at both ends.
    handler_map={h: HandlerLine2D(numpoints=2) for h in handles if h.get_gid() == _ERROR_BAR},
  )


def _fits(figure: Figure, handles: Sequence[Artist], columns: int) -> bool:
  """Returns whether a legend of that many columns, filled one by one, fits the figure's width."""
  texts = [TextPath((0, 0), str(handle.get_label()), size=7) for handle in handles]
  widths = [text.get_extents().width / 72 for text in texts]
  # The line sample to the left of a text, and the space after the text, take 0.46 inches.
  widest = [max(part) + 0.46 for part in np.array_split(widths, columns)]
  return sum(widest) <= figure.get_figwidth()
