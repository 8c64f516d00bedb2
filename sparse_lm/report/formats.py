"""A summary (see `table.summarise`) as Markdown, CSV and LaTeX (booktabs).

What a summary's numbers are and how they print stands in its `attrs`: the labels that make a row,
the columns, the baseline's labels, the seeds and the machines.
"""

import re
from typing import Any

import pandas as pd
from tabulate import tabulate

ABSENT = '—'


def text(frame: pd.DataFrame) -> pd.DataFrame:
  """A summary as it is printed: strings under headings."""
  printed = {name: [label_text(value) for value in frame[name]] for name in frame.attrs['rows']}
  printed['seeds'] = [str(n) for n in frame['seeds']]
  for c in frame.attrs['columns']:
    printed[c.heading] = _cells(frame, c, c.metric)
    if f'{c.metric}_delta_n' in frame and c.paired:
      printed[f'Δ {c.title or c.metric}'] = _cells(frame, c, f'{c.metric}_delta', sign='+')
  return pd.DataFrame(printed)


def _cells(frame: pd.DataFrame, c: Any, name: str, sign: str = '') -> list[str]:
  numbers = zip(frame[f'{name}_mean'], frame[f'{name}_std'], frame[f'{name}_n'])
  return [c.text(mean, std, sign) if n else ABSENT for mean, std, n in numbers]


def label_text(value: Any) -> str:
  """A label's value as tables and legends show it."""
  if value is None:
    return ABSENT
  return f'{value:g}' if isinstance(value, float) else str(value)


def notes(frame: pd.DataFrame) -> str:
  """What a reader must know of the numbers: seeds, spread, what differences are from, machines."""
  seeds = ', '.join(map(str, frame.attrs['seeds']))
  parts = [f'Mean ± sample standard deviation over seeds {seeds}; no ± where there is no spread.']
  if any(name.endswith('_delta_n') for name in frame.columns):
    labels = ', '.join(f'{k} {label_text(v)}' for k, v in frame.attrs['baseline'].items())
    parts.append(f'Δ: difference from {labels}, paired seed by seed.')
  if any(c.is_time for c in frame.attrs['columns']):
    parts.append('Times are as measured and, unless a run is packed, no claim of speed.')
  if machines := frame.attrs['machines']:
    parts.append(f'Made on {"; and on ".join(machines)}.')
  return ' '.join(parts)


def markdown(frame: pd.DataFrame, caption: str, command: str) -> str:
  """The caption, the table and its notes, with the command that reproduces them."""
  printed = text(frame).map(_pipes).rename(columns=_pipes)
  align = ['left'] * len(frame.attrs['rows'])
  align += ['right'] * (printed.shape[1] - len(align))
  body = tabulate(
    printed, headers='keys', tablefmt='pipe', showindex=False, disable_numparse=True, colalign=align
  )
  return f'**{caption}**\n\n{body}\n\n{notes(frame)} Reproduce: `{command}`\n'


def csv(frame: pd.DataFrame) -> str:
  """Means, standard deviations and counts in columns of their own, each in the metric's unit."""
  return frame.to_csv(index=False, lineterminator='\n')


def latex(frame: pd.DataFrame, caption: str, command: str, label: str) -> str:
  r"""A `table` float for a document that uses booktabs; `\label{tab:<label>}`."""
  printed = text(frame).map(_tex).rename(columns=_tex)
  width = len(frame.attrs['rows'])
  # Two hyphens would become a dash.
  verbatim = _tex(command).replace('--', '-{}-')
  return printed.style.hide(axis='index').to_latex(
    hrules=True,
    column_format='l' * width + 'r' * (printed.shape[1] - width),
    caption=f'{_tex(caption)}. {_tex(notes(frame))} Reproduce: \\texttt{{{verbatim}}}',
    label=f'tab:{label}',
    position='t',
    position_float='centering',
  )


def _pipes(value: str) -> str:
  return value.replace('|', r'\|')


_TEX = str.maketrans(
  {c: f'\\{c}' for c in '%_&#${}'}
  | {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
  | {'<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}'}
  | {'±': r'$\pm$', 'Δ': r'$\Delta$', '×': r'$\times$', 'µ': r'$\mu$', '≤': r'$\le$'}
  | {'≥': r'$\ge$', '—': '---', '–': '--'}
)


def _tex(value: str) -> str:
  """Text that LaTeX prints as it stands; a leading minus becomes a real one."""
  return re.sub(r'^-(?=[\d.])', '$-$', value.translate(_TEX))
