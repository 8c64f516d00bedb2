"""Tables over seeds: mean ± standard deviation of metrics, and paired differences from a baseline.

Each difference has a 95 % confidence interval, and a star if it is significant after correction for the
number of rows. If a margin is given, there is also an equivalence test (see `statistics`).

Times are shown as measured, without a difference from the baseline: the time of a run with masks says
nothing about the speed of the packed model.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import pandas as pd

from sparse_lm.core.errors import UserError
from sparse_lm.core.records import Json
from sparse_lm.report import formats, latex, results, statistics

TIMES = ('s', 'ms', 'µs', 'tokens/s')


@dataclasses.dataclass(frozen=True)
class Column:
  """One metric of a table.

  Attributes:
    metric: name of the metric in the lines.
    title: heading; '' means the name of the metric.
    format: format of a number, such as '.3f' or ',.0f'.
    unit: unit of the printed number, for the heading.
    scale: factor from the metric's own unit to the printed one. CSV files and frames keep the metric's
      own unit.
    paired: whether to add a column with the difference from the baseline, paired by seed. Raises a
      ValueError for times, because a difference of times would be a claim about speed.
    margin: margin of the equivalence test, in the metric's own unit; 0 means no test. The test adds a
      column that says whether the difference from the baseline is smaller than the margin, and otherwise
      how many seeds the test needs.
    note: a sentence below the table, such as the convention by which FLOPs are counted.
  """

  metric: str
  title: str = ''
  format: str = '.4g'
  unit: str = ''
  scale: float = 1.0
  paired: bool = False
  note: str = ''
  margin: float = 0.0

  def __post_init__(self) -> None:
    if self.margin and not self.paired:
      raise ValueError(f'{self.metric} has a margin, but no difference from the baseline (paired)')
    if self.paired and self.is_time:
      raise ValueError(f'{self.metric} is a time: it is shown as measured, not as a difference')

  @property
  def is_time(self) -> bool:
    """True if the metric is a measured time or a rate."""
    return self.unit in TIMES

  @property
  def heading(self) -> str:
    """The title with the unit in parentheses."""
    return (self.title or self.metric) + (f' ({self.unit})' if self.unit else '')

  def number(self, value: float, sign: str = '') -> str:
    """Formats a value of the metric in the column's unit; `sign` may be '+', to show plus signs."""
    return f'{value * self.scale:{sign}{self.format}}'

  def text(self, mean: float, std: float) -> str:
    """Formats `mean ± std`, or the mean alone if there is no spread."""
    shown = self.number(mean)
    return shown if math.isnan(std) or std == 0 else f'{shown} ± {self.number(std)}'

  def difference(self, mean: float, low: float, high: float, p: float) -> str:
    """Formats `mean [low, high]`, with a star if the corrected p-value is significant."""
    shown = self.number(mean, '+')
    if math.isnan(low) or low == high:
      return shown
    star = '*' if p < statistics.ALPHA else ''
    return f'{shown} [{self.number(low, "+")}, {self.number(high, "+")}]{star}'

  def equivalence(self, mean: float, p: float, seeds: float) -> str:
    """Formats the outcome of the equivalence test; a failed one with the number of seeds it needs."""
    if math.isnan(p):
      return 'not shown: 1 seed'
    if p < statistics.ALPHA:
      return f'yes (p = {p:.3f})' if p >= 0.001 else 'yes (p < 0.001)'
    if abs(mean) >= self.margin:
      return 'not shown: Δ is not smaller'
    most = f'more than {statistics.MOST_SEEDS}'
    return f'not shown: needs {most if math.isinf(seeds) else f"{seeds:.0f}"} seeds'


def ratio(metric: str, title: str, format: str) -> tuple[Column, Column, Column]:
  """Returns the columns of a median ratio and of its lower and upper quartile."""
  return (
    Column(metric, title, format, '×'),
    Column(f'{metric}_low', 'lower quartile', format, '×'),
    Column(f'{metric}_high', 'upper quartile', format, '×'),
  )


def speedup(metric: str, what: str, short: str = '') -> list[Column]:
  """Returns columns of a ratio of times, `what: dense / packed`, and of its lower and upper quartile."""
  return [
    Column(metric, f'{what}, dense / packed', '.2f'),
    Column(f'{metric}_low', f'{short or what}, lower quartile', '.2f'),
    Column(f'{metric}_high', f'{short or what}, upper quartile', '.2f'),
  ]


_PAIRS = (
  'Attention is charged over all pairs of the context. Attention that reads only some of the causal '
  'pairs is charged the same fraction of all. Columns of causal pairs charge only pairs that are read.'
)
_TRAINING = (
  "Training FLOPs are those of the run's own steps, including second forward passes and a teacher's "
  'forward passes. Training also computes units behind closed gates, and they are charged.'
)
_ANCESTORS = (
  'Training FLOPs with ancestors add those of the runs whose weights a run started from; the dense twin '
  "is charged only for the run's own steps."
)
# The metrics of `sparse_lm.train`, with their titles, formats and units.
COLUMNS = (
  Column('val_loss', 'validation loss', '.4f', 'nats/token', paired=True),
  Column('val_bits_per_byte', 'validation', '.4f', 'bits/byte', paired=True),
  Column('sparsity_prunable', 'prunable sparsity', '.1f', '%', 100),
  Column('sparsity_total', 'total sparsity', '.1f', '%', 100),
  Column('params', 'parameters', ',.0f'),
  Column('nonzero_params', 'nonzero parameters', ',.0f'),
  Column('active_params', 'active parameters', ',.0f'),
  Column('flops_forward', 'forward', ',.0f', 'kFLOP/token', 1e-3, note=_PAIRS),
  Column('flops_forward_ratio', 'forward FLOPs', '.3f', '× own dense twin', note=_PAIRS),
  Column(
    'flops_forward_causal_ratio',
    'forward FLOPs, causal pairs',
    '.3f',
    '× own dense twin',
    note=_PAIRS,
  ),
  Column('flops_training_ratio', 'training FLOPs', '.3f', '× own dense twin', note=_TRAINING),
  Column(
    'flops_training_total_ratio',
    'training FLOPs with ancestors',
    '.3f',
    '× own dense twin',
    note=_ANCESTORS,
  ),
  Column('active', 'active neurons', '.1f', '%', 100),
  Column('dead', 'dead neurons', '.1f', '%', 100),
  Column('union_8', 'active in 8 tokens', '.1f', '%', 100),
  Column('union_32', 'active in 32 tokens', '.1f', '%', 100),
  Column('drop_rate', 'dropped', '.1f', '%', 100),
  Column('max_violation', 'load violation', '.2f'),
  Column('stored_bytes', 'stored', ',.1f', 'kB', 1e-3),
  Column('train_step_ms', 'training step', '.1f', 'ms'),
  Column('packed_step_ms', 'training step of a pack of runs', '.2f', 'ms'),
)


def column(metric: str | Column) -> Column:
  """Returns the column of a known metric, or one with default formatting; a `Column` as it is."""
  if isinstance(metric, Column):
    return metric
  return next((known for known in COLUMNS if known.metric == metric), Column(metric))


def with_margin(column: Column, margin: float) -> Column:
  """Returns the column, with an equivalence test if the margin is not zero."""
  return dataclasses.replace(column, paired=True, margin=margin) if margin else column


def summarise(
  lines: Sequence[results.Line],
  rows: Sequence[str],
  columns: Sequence[Column],
  baseline: Mapping[str, Json] | None = None,
) -> pd.DataFrame:
  """Returns a table with one row for each combination of labels, in order of first appearance.

  Args:
    lines: the runs of a study, in the order of the rows.
    rows: labels that make up a row. Runs that agree in them may differ only in their seed.
    columns: columns in order.
    baseline: labels of the row that paired columns compare the others with. If several rows have them,
      each row is compared with the one whose other labels are the same, such as the corpus.

  Returns:
    A frame whose `attrs` say how to print it. Its columns are the labels `rows`, `seeds` (their number),
    `diverged` (the number of diverged seeds, if there are any), and for each metric, in its own unit,
    `<metric>_mean`, `_std` (sample; nan for one seed) and `_n`. A paired metric also has, over the seeds
    that the row and the baseline share, `<metric>_delta_mean`, `_delta_std`, `_delta_n`, `_delta_low` and
    `_delta_high` (95 % interval), `_delta_p` (paired t test) and `_delta_p_holm` (corrected for the
    number of rows). With a margin, it has `<metric>_equivalence_p` and `_equivalence_seeds`.

  Raises:
    UserError: a label or metric is unknown, no run matches the baseline, or runs of a row differ.
    ValueError: two columns have the same heading.
  """
  for c in columns:
    results.check_metric(lines, c.metric)
  if len({c.heading for c in columns}) < len(columns):
    raise ValueError(f'two columns have the same heading: {[c.heading for c in columns]}')
  groups = results.group(lines, rows)
  bases = {key: of for key, of in groups.items() if results.matches(of[0], baseline or {})}
  if baseline and not bases:
    raise UserError(f'no run has the labels of the baseline {dict(baseline)}')
  records = []
  for key, members in groups.items():
    base = _base_of(key, bases) if baseline else None
    row = {**dict(zip(rows, key)), 'seeds': len(members)}
    records.append(row | _numbers(columns, members, base))
  frame = pd.DataFrame(records)
  if baseline:
    _insert_corrected(frame, [c.metric for c in columns if c.paired])
  diverged = [sum(map(results.has_diverged, members)) for members in groups.values()]
  if any(diverged):
    frame.insert(len(rows) + 1, 'diverged', diverged)
  # dtype object: pandas would convert the integers of a label that some runs lack to floats.
  frame = frame.assign(
    **{name: pd.Series([r[name] for r in records], dtype=object) for name in rows}
  )
  frame.attrs = {
    'rows': list(rows),
    'columns': list(columns),
    'baseline': dict(baseline or {}),
    'seeds': sorted({line['seed'] for line in lines}),
    'machines': results.machines(lines),
    'best': {c.metric: _best(groups, c.metric) for c in columns if c.paired},
  }
  return frame


def _base_of(key: results.Key, bases: Mapping[results.Key, list]) -> list[results.Line]:
  """Returns the lines of a row's baseline; empty if the row is a baseline or has none."""
  if key in bases:
    return []
  varying = [i for i, values in enumerate(zip(*bases)) if len(set(values)) > 1]
  return next((bases[b] for b in bases if all(b[i] == key[i] for i in varying)), [])


def _numbers(
  columns: Sequence[Column], members: Sequence[results.Line], base: Sequence[results.Line] | None
) -> dict[str, float]:
  """Returns the numbers of a row, compared with the lines `base` unless it is `None`."""
  record = {}
  for c in columns:
    values = list(results.by_seed(members, c.metric).values())
    mean, std = statistics.mean_std(values)
    record |= {f'{c.metric}_mean': mean, f'{c.metric}_std': std, f'{c.metric}_n': len(values)}
    if c.paired and base is not None:
      record |= _comparison(c, members, base)
  return record


def _comparison(
  c: Column, members: Sequence[results.Line], base: Sequence[results.Line]
) -> dict[str, float]:
  """Returns the paired difference of a row from its baseline, with interval and p-values."""
  own, other = (results.by_seed(lines, c.metric) for lines in (members, base))
  found = statistics.Difference.paired(own, other)
  low, high = found.interval()
  numbers = {'mean': found.mean, 'std': found.std, 'n': found.n}
  numbers |= {'low': low, 'high': high, 'p': found.p}
  record = {f'{c.metric}_delta_{name}': value for name, value in numbers.items()}
  if c.margin:
    record[f'{c.metric}_equivalence_p'] = found.equivalence_p(c.margin)
    record[f'{c.metric}_equivalence_seeds'] = found.seeds_for_equivalence(c.margin)
  return record


def _best(groups: Mapping[results.Key, list[results.Line]], metric: str) -> list[bool]:
  """Marks rows of a mean significantly below those of all rows that differ only in the first label."""
  seeds = {key: results.by_seed(members, metric) for key, members in groups.items()}
  found = []
  for key, own in seeds.items():
    rivals = [other for k, other in seeds.items() if k != key and k[1:] == key[1:]]
    differences = [statistics.Difference.paired(own, other) for other in rivals]
    lower = all(difference.mean < 0 for difference in differences)
    corrected = statistics.holm([difference.p for difference in differences])
    found.append(bool(rivals) and lower and all(p < statistics.ALPHA for p in corrected))
  return found


def _insert_corrected(frame: pd.DataFrame, metrics: Sequence[str]) -> None:
  """Inserts a column of p-values after Holm's correction beside each column of p-values."""
  for metric in metrics:
    after = frame.columns.get_loc(f'{metric}_delta_p') + 1
    corrected = statistics.holm(list(frame[f'{metric}_delta_p']))
    frame.insert(after, f'{metric}_delta_p_holm', corrected)


def write(frame: pd.DataFrame, folder: str | pathlib.Path, caption: str, command: str) -> str:
  """Writes `table.md`, `table.csv` and `table.tex` in `folder` and returns the Markdown.

  Args:
    frame: from `summarise`.
    folder: created if it is missing; its name becomes the LaTeX label.
    caption: one line, without a full stop.
    command: the command that reproduces the table.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  contents = {
    'table.md': formats.markdown(frame, caption, command),
    'table.csv': formats.csv(frame),
    'table.tex': latex.latex(frame, caption, command, folder.name),
  }
  for name, content in contents.items():
    replace(folder / name, content)
  return contents['table.md']


def replace(file: pathlib.Path, content: str) -> None:
  """Writes a file atomically, since several processes may write the table of a study."""
  temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
  temporary.write_text(content, encoding='utf-8')
  os.replace(temporary, file)
