"""Tables over seeds: mean ± std of metrics, and paired differences from a baseline.

There is no column of speed-ups over the baseline. Times are shown as measured: that a masked run
would be faster once packed is not for a table to say.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import pandas as pd

from sparse_lm.core.errors import UserError
from sparse_lm.core.records import Json
from sparse_lm.report import formats, results

TIMES = ('s', 'ms', 'µs', 'tokens/s')


@dataclasses.dataclass(frozen=True)
class Column:
  """One metric of a table.

  Attributes:
    metric: its name in the lines.
    title: heading; '' = the metric's name.
    format: of a number, such as '.3f' or ',.0f'.
    unit: after `scale` has been applied, for the heading.
    scale: what a metric is multiplied by before it is printed; numbers in CSV and in frames stay in
      the metric's own unit.
    paired: whether a second column gives the difference from the baseline, seed by seed. Refused
      for times (ValueError): a difference of times is a claim of speed.
    note: a sentence below a table with this column: the convention by which its numbers are counted.
  """

  metric: str
  title: str = ''
  format: str = '.4g'
  unit: str = ''
  scale: float = 1.0
  paired: bool = False
  note: str = ''

  def __post_init__(self) -> None:
    if self.paired and self.is_time:
      raise ValueError(f'{self.metric} is a time: it is shown as measured, not as a difference')

  @property
  def is_time(self) -> bool:
    """Whether it was measured with a clock."""
    return self.unit in TIMES

  @property
  def heading(self) -> str:
    """Title and unit."""
    return (self.title or self.metric) + (f' ({self.unit})' if self.unit else '')

  def text(self, mean: float, std: float, sign: str = '') -> str:
    """`mean ± std` as printed; the spread only where there is one."""
    if math.isnan(std) or std == 0:
      return f'{mean * self.scale:{sign}{self.format}}'
    return f'{mean * self.scale:{sign}{self.format}} ± {std * self.scale:{self.format}}'


def speedup(metric: str, what: str, short: str = '') -> list[Column]:
  """Columns of a ratio of times, `what: dense / packed`, and of its quartiles `_low` and `_high`."""
  return [
    Column(metric, f'{what}, dense / packed', '.2f'),
    Column(f'{metric}_low', f'{short or what}, lower quartile', '.2f'),
    Column(f'{metric}_high', f'{short or what}, upper quartile', '.2f'),
  ]


_PAIRS = (
  'Attention is charged over all pairs of the context, a window with the share that it reads of the '
  'causal pairs; columns of causal pairs charge the pairs that are read and no other.'
)
_TRAINING = (
  "Training FLOPs are those of the run's own steps, second forward passes and a teacher's included; what "
  'gates close is computed in training and charged.'
)
_ANCESTORS = (
  'Training FLOPs with ancestors add those of the runs whose weights a run started from; the dense twin '
  "trains for the run's own steps alone."
)
# What `sparse_lm.train` measures, ready to print.
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
)


def column(metric: str) -> Column:
  """The known column of a metric, or a plain one."""
  return next((known for known in COLUMNS if known.metric == metric), Column(metric))


def summarise(
  lines: Sequence[results.Line],
  rows: Sequence[str],
  columns: Sequence[Column],
  baseline: Mapping[str, Json] | None = None,
) -> pd.DataFrame:
  """One row for each group of labels, in order of first appearance.

  Args:
    lines: of a study, in the order that its rows are to have.
    rows: labels whose values make a row; together they tell all runs but seeds apart.
    columns: metrics in order.
    baseline: labels of the row(s) that paired columns are compared with. Of several, a row is
      compared with the one that shares its values of the other labels (its own corpus, say).

  Returns:
    Columns `rows`, `seeds` (their number), `diverged` (how many of them, in a table where any did),
    and for each metric, in its own unit, `<metric>_mean`,
    `_std` (sample; nan for one seed) and `_n`; where paired `<metric>_delta_mean`, `_delta_std` and
    `_delta_n`, over the seeds that row and baseline share. How to print it is in its `attrs`.

  Raises:
    UserError: an unknown label or metric, a baseline that no run matches, or a row that mixes runs.
    ValueError: two columns have one heading.
  """
  for c in columns:
    results.check_metric(lines, c.metric)
  if len({c.heading for c in columns}) < len(columns):
    raise ValueError(f'two columns of one heading: {[c.heading for c in columns]}')
  groups = results.group(lines, rows)
  bases = {
    key: members for key, members in groups.items() if results.matches(members[0], baseline or {})
  }
  if baseline and not bases:
    raise UserError(f'no run has the labels of the baseline {dict(baseline)}')
  records = []
  for key, members in groups.items():
    record = {**dict(zip(rows, key)), 'seeds': len(members)}
    base = _base_of(key, bases) if baseline else None
    for c in columns:
      record |= _numbers(c.metric, members, base if c.paired and baseline else None)
    records.append(record)
  frame = pd.DataFrame(records)
  diverged = [sum(map(results.has_diverged, members)) for members in groups.values()]
  if any(diverged):
    frame.insert(len(rows) + 1, 'diverged', diverged)
  # As objects, or a label that some runs lack would turn the others' integers into floats.
  frame = frame.assign(
    **{name: pd.Series([r[name] for r in records], dtype=object) for name in rows}
  )
  frame.attrs = {
    'rows': list(rows),
    'columns': list(columns),
    'baseline': dict(baseline or {}),
    'seeds': sorted({line['seed'] for line in lines}),
    'machines': results.machines(lines),
  }
  return frame


def _base_of(key: results.Key, bases: Mapping[results.Key, list]) -> list[results.Line]:
  """The baseline's lines for a row; none for a row that is a baseline, or has none."""
  if key in bases:
    return []
  varying = [i for i, values in enumerate(zip(*bases)) if len(set(values)) > 1]
  return next((bases[b] for b in bases if all(b[i] == key[i] for i in varying)), [])


def _numbers(
  metric: str, members: Sequence[results.Line], base: Sequence[results.Line] | None
) -> dict[str, float]:
  own = results.by_seed(members, metric)
  mean, std = results.mean_std(list(own.values()))
  numbers = {f'{metric}_mean': mean, f'{metric}_std': std, f'{metric}_n': len(own)}
  if base is not None:
    other = results.by_seed(base, metric)
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    mean, std = results.mean_std(differences)
    numbers |= {f'{metric}_delta_mean': mean, f'{metric}_delta_std': std}
    numbers[f'{metric}_delta_n'] = len(differences)
  return numbers


def write(frame: pd.DataFrame, folder: str | pathlib.Path, caption: str, command: str) -> str:
  """Writes `table.md`, `table.csv` and `table.tex` in `folder` and returns the Markdown.

  Args:
    frame: from `summarise`.
    folder: made where it is missing; its name becomes the LaTeX label.
    caption: one line, without a full stop.
    command: what reproduces the table.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  contents = {
    'table.md': formats.markdown(frame, caption, command),
    'table.csv': formats.csv(frame),
    'table.tex': formats.latex(frame, caption, command, folder.name),
  }
  for name, content in contents.items():
    replace(folder / name, content)
  return contents['table.md']


def replace(file: pathlib.Path, content: str) -> None:
  """Writes a whole file. Shards may write at the same time, and a reader never sees half a file."""
  temporary = file.with_name(f'{file.name}.{os.getpid()}.tmp')
  temporary.write_text(content, encoding='utf-8')
  os.replace(temporary, file)
