"""A figure of a run's training log: metrics over optimizer steps."""

from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from sparse_lm.core.errors import unknown
from sparse_lm.report import plot
from sparse_lm.report.table import Column, column

# What the log holds besides the metrics of result tables.
LOGGED = (
  Column('loss', 'training loss', unit='nats/token'),
  Column('learning_rate', 'learning rate'),
  Column('gradient_norm', 'gradient norm'),
  Column('tokens_per_second', 'throughput', unit='tokens/s'),
)
LOSSES = ('loss', 'val_loss')


def figure(log: pd.DataFrame, names: Sequence[str]) -> Figure:
  """Draws columns of a log over its index of steps, with a panel for each unit.

  Args:
    log: a row for each logged step, NaN where a metric was not logged.
    names: its columns to draw.

  Raises UserError for an unknown column.
  """
  panels: dict[str, list[Column]] = {}
  for name in names:
    if name not in log.columns:
      raise unknown('metric', name, log.columns)
    own = next((column for column in LOGGED if column.metric == name), column(name))
    panels.setdefault(own.unit or own.metric, []).append(own)
  with matplotlib.rc_context(plot.STYLE):
    made = Figure(figsize=(6.4, 2.6 * len(panels)), layout='constrained')
    every = made.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, columns in zip(every, panels.values()):
      for index, own in enumerate(columns):
        values = log[own.metric].dropna() * own.scale
        axes.plot(
          values.index,
          values,
          plot.LINES[index % len(plot.LINES)],
          color=plot.COLOURS[index % len(plot.COLOURS)],
          marker=plot.MARKERS[index % len(plot.MARKERS)] if len(values) <= 30 else None,
          label=own.heading,
        )
      axes.set(ylabel=columns[0].heading if len(columns) == 1 else columns[0].unit)
      if len(columns) > 1:
        axes.legend()
    every[-1].set(xlabel='optimizer step')
  return made
