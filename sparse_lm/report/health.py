"""Router health: the load of every expert and the entropy of every router over training."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparse_lm.core.errors import UserError
from sparse_lm.report import style, training_log

# What training logs: the load of an expert of a layer.
LOAD = re.compile(r'(?!val/)(.+)/load/(\d+)')
COLUMNS = 2


def router_health(metrics: str | pathlib.Path) -> Figure:
  """Draws a panel for each routed layer, with a row for each expert, and a last panel of all routers.

  In the panels of layers, colour is an expert's share of the (token, expert) pairs. The last panel has a
  row for each router, and colour is the router's entropy in nats/token.

  Args:
    metrics: a run's `metrics.jsonl`.

  Raises:
    UserError: the file is missing, or its model has no experts.
  """
  log = training_log.read(pathlib.Path(metrics))
  layers: dict[str, dict[str, pd.Series]] = {}
  for name in log:
    if match := LOAD.fullmatch(name):
      layers.setdefault(match[1], {})[f'expert {match[2]}'] = log[name].dropna()
  if not layers:
    raise UserError(f'{metrics} has no logged load of experts; valid: a run with experts')
  entropies = {layer: log[f'{layer}/entropy'].dropna() for layer in layers}
  most = max(load.max() for loads in layers.values() for load in loads.values())
  experts = max(map(len, layers.values()))
  rows = math.ceil(len(layers) / COLUMNS)
  with matplotlib.rc_context(style.RC | {'axes.grid': False}):
    per_row = 0.35 + 0.115 * experts
    last = 0.35 + 0.115 * len(layers)
    figure = style.figure(0.5 + per_row * rows + last)
    grid = figure.add_gridspec(rows + 1, COLUMNS, height_ratios=[*[per_row] * rows, last])
    panels = [figure.add_subplot(grid[divmod(i, COLUMNS)]) for i in range(len(layers))]
    for axes, (layer, loads) in zip(panels, layers.items()):
      load = _draw(axes, layer, loads, 0, most)
    even = ', '.join(f'{100 / n:.3g} %' for n in sorted({len(each) for each in layers.values()}))
    bar = figure.colorbar(load, ax=panels, aspect=35, format=PercentFormatter(1.0, 0, ' %'))
    bar.set_label(f'share of the (token, expert) pairs\n(even load: {even})')
    axes = figure.add_subplot(grid[rows, :])
    entropy = _draw(axes, 'entropy of the routers', entropies, None, math.log(experts))
    bar = figure.colorbar(entropy, ax=[axes])
    bar.set_label(f'nats/token\n(uniform: {math.log(experts):.2f})')
    axes.set_xlabel('step')
  return figure


def _draw(
  axes: Axes, title: str, curves: Mapping[str, pd.Series], low: float | None, high: float
) -> matplotlib.cm.ScalarMappable:
  """Draws a row of coloured cells for each curve, from top to bottom; each logged step is a cell."""
  steps = list(next(iter(curves.values())).index)
  values = np.array(list(curves.values()))
  # Small values are light and large values dark, even in grey.
  mesh = axes.pcolormesh(_edges(steps), range(len(curves) + 1), values, cmap='cividis_r')
  mesh.set_clim(low, high)
  axes.set_yticks(np.arange(len(curves)) + 0.5, list(curves))
  axes.invert_yaxis()
  axes.tick_params(length=0, axis='y')
  axes.set_title(title, pad=3)
  return mesh


def _edges(steps: Sequence[int]) -> list[float]:
  """Returns the edges of the cells of the logged steps; each cell ends at its step."""
  return [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]
