"""How routing went: the load of every expert and the entropy of the router, over training."""

import math
import pathlib
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_lm.core.errors import UserError
from sparse_lm.report.plot import COLOURS, STYLE
from sparse_lm.runs.workdir import read_log

# Of a layer, then an expert, as training logs them.
LOAD = re.compile(r'(?!val/)(.+)/load/(\d+)')
Curve = tuple[list[int], list[float]]


def router_health(metrics: str | pathlib.Path) -> Figure:
  """A panel of loads for each routed layer, and one of all layers' entropies.

  Loads are shares of the (token, expert) pairs, with a marked line where all are equal; entropies
  are in nats a token, the uniform router's marked.

  Args:
    metrics: a run's `metrics.jsonl`.

  Raises:
    UserError: the file is missing, or its model routes nothing.
  """
  curves = read(metrics)
  layers: dict[str, list[str]] = {}
  for name in curves:
    if match := LOAD.fullmatch(name):
      layers.setdefault(match[1], []).append(name)
  if not layers:
    raise UserError(f'{metrics} logs no load of an expert; valid: a run with experts')
  columns = min(len(layers) + 1, 3)
  rows = math.ceil((len(layers) + 1) / columns)
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, (layer, names) in zip(axes, layers.items()):
      _draw(place, layer, {name.rpartition('/')[2]: curves[name] for name in names}, 1 / len(names))
      place.set(ylabel='share of the pairs', ylim=(0, None))
    entropies = {layer: curves[f'{layer}/entropy'] for layer in layers}
    last = axes[len(layers)]
    _draw(last, 'entropy of the router', entropies, math.log(max(map(len, layers.values()))))
    last.set(ylabel='nats', ylim=(0, None))
    last.legend(fontsize=7, loc='lower left')
    for unused in axes[len(layers) + 1 :]:
      unused.remove()
  return figure


def read(metrics: str | pathlib.Path) -> dict[str, Curve]:
  """Steps and values of every number that a run logged, by name."""
  path = pathlib.Path(metrics)
  if not path.is_file():
    raise UserError(f'no file {path}; valid: the metrics.jsonl of a run')
  curves: dict[str, Curve] = {}
  for _, line in read_log(path):
    for name, value in line.items():
      if name != 'step':
        steps, values = curves.setdefault(name, ([], []))
        steps.append(line['step'])
        values.append(value)
  return curves


def _draw(axes: Axes, title: str, curves: dict[str, Curve], even: float) -> None:
  axes.axhline(even, color='#555555', linestyle='--', linewidth=1.2)
  for index, (name, (steps, values)) in enumerate(curves.items()):
    style = '-' if index < len(COLOURS) else ':'
    axes.plot(steps, values, style, label=name, color=COLOURS[index % len(COLOURS)], linewidth=1.3)
  axes.set_title(title, fontsize=9)
  axes.set(xlabel='step')
