"""A run's training log as a table, and its figure: metrics over optimizer steps."""

import pathlib
from collections.abc import Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from sparse_lm.core.errors import UserError, unknown
from sparse_lm.report import style
from sparse_lm.report.table import Column, column
from sparse_lm.runs.workdir import read_log

# What the log holds besides the metrics of result tables.
LOGGED = (
  Column('loss', 'training loss', unit='nats/token'),
  Column('learning_rate', 'learning rate'),
  Column('gradient_norm', 'gradient norm'),
  Column('tokens_per_second', 'throughput', unit='tokens/s'),
)
LOSSES = ('loss', 'val_loss')


def read(file: pathlib.Path) -> pd.DataFrame:
  """Reads a run's metrics.jsonl: a row for each logged step, a column for each metric.

  A metric that was not logged at a step is NaN there.

  Raises UserError if there is no such file, or no intact line in it.
  """
  if not file.is_file():
    raise UserError(
      f'{file.parent} has no {file.name}; valid: a run that was trained (one-shot pruning logs no steps)'
    )
  lines = [values for _, values in read_log(file)]
  if not lines:
    raise UserError(f'{file.parent}: {file.name} has no intact line; valid: the log of a run')
  # A step's metrics and those of the evaluation after it are two lines of the file.
  return pd.DataFrame(lines).groupby('step').last()


def figure(log: pd.DataFrame, names: Sequence[str]) -> Figure:
  """Draws columns of a log over its index of steps, with a panel for each unit.

  A unit of more than six columns has several panels.

  Args:
    log: a row for each logged step, NaN where a metric was not logged.
    names: its columns to draw.

  Raises UserError for an unknown column.
  """
  panels: dict[str, list[Column]] = {}
  for name in names:
    if not isinstance(name, str) or name not in log.columns:
      raise unknown('metric', name, log.columns)
    own = next((known for known in LOGGED if known.metric == name), column(name))
    panels.setdefault(own.unit or own.metric, []).append(own)
  parts = [
    columns[i : i + len(style.SERIES)]
    for columns in panels.values()
    for i in range(0, len(columns), len(style.SERIES))
  ]
  with matplotlib.rc_context(style.RC):
    made = style.figure(0.2 + 1.6 * len(parts))
    every = made.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, columns in zip(every, parts):
      for own, look in zip(columns, style.SERIES):
        values = log[own.metric].dropna() * own.scale
        drawn = style.handle(own.heading, look)
        drawn.set_data(values.index, values)
        drawn.set_markevery(max(1, len(values) // 10))
        axes.add_line(drawn)
      axes.autoscale_view()
      axes.set(ylabel=columns[0].heading if len(columns) == 1 else columns[0].unit)
      if len(columns) > 1:
        axes.legend()
    every[-1].set(xlabel='optimizer step')
  return made
