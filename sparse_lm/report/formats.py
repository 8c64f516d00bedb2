"""A summary (see `table.summarise`) as printed cells, Markdown and CSV. LaTeX is in `latex`.

The `attrs` of a summary say what its numbers are and how they are printed. They hold the labels that
make a row, the columns, the baseline's labels, the seeds and the machines.
"""

from collections.abc import Callable, Sequence

import pandas as pd
from tabulate import tabulate

from sparse_lm.report import statistics
from sparse_lm.report.names import ABSENT, display

DIVERGED = 'diverged'  # instead of a mean that would leave a seed out


def text(frame: pd.DataFrame) -> pd.DataFrame:
  """Returns a summary as it is printed: formatted cells under headings."""
  printed = {name: [display(value) for value in frame[name]] for name in frame.attrs['rows']}
  printed['seeds'] = [str(n) for n in frame['seeds']]
  if 'diverged' in frame:
    pairs = zip(frame['seeds'], frame['diverged'])
    printed['seeds'] = [f'{n}, {lost} {DIVERGED}' if lost else f'{n}' for n, lost in pairs]
  for c in frame.attrs['columns']:
    name = c.metric
    printed[c.heading] = _cells(frame, c.text, f'{name}_n', [f'{name}_mean', f'{name}_std'])
    if c.paired and f'{name}_delta_n' in frame:
      keys = [f'{name}_delta_{key}' for key in ('mean', 'low', 'high', 'p_holm')]
      printed[f'Δ {c.heading}'] = _cells(frame, c.difference, f'{name}_delta_n', keys)
    if f'{name}_equivalence_p' in frame:
      keys = [f'{name}_delta_mean', f'{name}_equivalence_p', f'{name}_equivalence_seeds']
      heading = f'Δ within ±{c.margin * c.scale:g}' + (f' {c.unit}' if c.unit else '')
      printed[heading] = _cells(frame, c.equivalence, f'{name}_delta_n', keys)
  return pd.DataFrame(printed)


def _cells(
  frame: pd.DataFrame, text: Callable[..., str], count: str, keys: Sequence[str]
) -> list[str]:
  """Formats each row's values of the columns `keys` with `text`, if its `count` is not zero."""
  diverged = frame['diverged'] if 'diverged' in frame else [0] * len(frame)
  numbers = zip(frame[count], diverged, *(frame[key] for key in keys))
  return [DIVERGED if lost else text(*values) if n else ABSENT for n, lost, *values in numbers]


def notes(frame: pd.DataFrame) -> str:
  """Returns the notes below a table: seeds, spread, baseline, counting conventions and machines."""
  seeds = ', '.join(map(str, frame.attrs['seeds']))
  parts = [f'Mean ± sample standard deviation over seeds {seeds}; no ± where there is no spread.']
  if any(name.endswith('_delta_n') for name in frame.columns):
    parts += _methods_of_comparison(frame)
  parts += dict.fromkeys(c.note for c in frame.attrs['columns'] if c.note)
  if any(c.is_time for c in frame.attrs['columns']):
    parts.append('Times are as measured. Only the times of packed models are claims of speed.')
  if machines := frame.attrs['machines']:
    parts.append(f'Made on {"; and on ".join(machines)}.')
  return ' '.join(parts)


def _methods_of_comparison(frame: pd.DataFrame) -> list[str]:
  """Returns sentences that say how differences, intervals and tests were computed."""
  labels = ', '.join(f'{k} {display(v)}' for k, v in frame.attrs['baseline'].items())
  parts = [
    f'Δ: mean difference from {labels}, paired seed by seed, with its '
    f"{statistics.CONFIDENCE:.0%} confidence interval by Student's t distribution."
  ]
  rows = {f'{frame[name].notna().sum()}' for name in frame if name.endswith('_delta_p')}
  parts.append(
    f'*: significant at {statistics.ALPHA:.0%} (two-sided paired t test) after '
    f"Holm's correction for the {' or '.join(sorted(rows))} rows that are compared."
  )
  if any(name.endswith('_equivalence_p') for name in frame.columns):
    parts.append(
      'Δ within ±: whether two one-sided paired t tests (TOST) at '
      f'{statistics.ALPHA:.0%}, not corrected for the number of rows, show that Δ lies within this '
      f'margin; else the number of seeds for a power of {statistics.POWER:.0%}, if the true mean and '
      'standard deviation of the differences are those observed.'
    )
  return parts


def markdown(frame: pd.DataFrame, caption: str, command: str) -> str:
  """Returns a Markdown table with its caption, its notes, and the command that reproduces it."""
  printed = text(frame).map(_pipes).rename(columns=_pipes)
  align = ['left'] * len(frame.attrs['rows'])
  align += ['right'] * (printed.shape[1] - len(align))
  body = tabulate(
    printed, headers='keys', tablefmt='pipe', showindex=False, disable_numparse=True, colalign=align
  )
  explained = notes(frame).replace('*', r'\*')  # a star alone would begin emphasis
  return f'**{caption}**\n\n{body}\n\n{explained} Reproduce: `{command}`\n'


def csv(frame: pd.DataFrame) -> str:
  """Returns CSV text: means, standard deviations and counts in separate columns, in the metric's unit."""
  return frame.to_csv(index=False, lineterminator='\n')


def _pipes(value: str) -> str:
  return ' '.join(value.split()).replace('|', r'\|')
