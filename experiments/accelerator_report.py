"""Tables and the figure of the accelerator studies, of one machine or of several side by side."""

import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tabulate import tabulate

from experiments import accelerator_goals
from experiments.accelerator_goals import Goal
from sparse_lm.core.records import Json
from sparse_lm.report import plot, results, style
from sparse_lm.report.names import ABSENT, display
from sparse_lm.report.table import replace

Rows = dict[str, results.Line]
GOAL = {
  'color': 'black', 'marker': '|', 'markersize': 9, 'markeredgewidth': 1.8, 'linestyle': 'none',
}  # fmt: skip


class Cell(NamedTuple):
  """A column of the table of steps.

  Attributes:
    heading: title and unit.
    metrics: the name of one metric, or of a metric and its quartiles.
    format: format of a number.
    scale: factor that each metric is multiplied by before it is printed.
  """

  heading: str
  metrics: tuple[str, ...]
  format: str
  scale: float = 1.0

  def text(self, found: Mapping[str, Json]) -> str:
    """Formats a cell as `value`, or as `value (lower quartile–upper quartile)`."""
    values = [found.get(metric) for metric in self.metrics]
    if any(value is None for value in values):
      return ABSENT
    first, *ends = (f'{value * self.scale:{self.format}}' for value in values)
    return f'{first} ({"–".join(ends)})' if ends else first


CELLS = (
  Cell('step (ms)', ('step_ms', 'step_ms_low', 'step_ms_high'), '.2f'),
  Cell('reference (ms)', ('reference_ms',), '.2f'),
  Cell('step / reference (×)', ('ratio', 'ratio_low', 'ratio_high'), '.3f'),
  Cell('mask update (ms)', ('update_ms',), '.1f'),
  Cell('decode (ms)', ('decode_ms',), '.2f'),
  Cell(
    'decode, dense / packed (×)',
    ('decode_speedup', 'decode_speedup_low', 'decode_speedup_high'),
    '.2f',
  ),
  Cell('speed (TFLOP/s)', ('flops_per_s',), '.4g', 1e-12),
  Cell('FLOP/s / matmul peak (×)', ('fraction_of_peak',), '.2f'),
  Cell('peak memory (GB)', ('peak_memory',), '.2f', 1e-9),
  Cell('energy (mJ/token)', ('joules_per_token',), '.3g', 1e3),
)


def by_machine(lines: Iterable[results.Line]) -> dict[str, Rows]:
  """Returns, for each machine, the newest line of each row that was measured on it."""
  found: dict[str, Rows] = {}
  for line in lines:
    found.setdefault(results.machine(line['env']), {})[line['labels']['row']] = line
  return found


def write(lines: Sequence[results.Line], folder: pathlib.Path) -> str:
  """Writes `table.md` and the figure in a study's folder and returns the Markdown."""
  text = page(lines, folder)
  replace(folder / 'table.md', text)
  return text


def page(lines: Iterable[results.Line], folder: pathlib.Path) -> str:
  """Returns a table of all machines' goals and one table per machine; writes the figure to `folder`."""
  machines = by_machine(lines)
  if any(_ratios(rows) for rows in machines.values()):
    plot.save(ratios(machines, folder.name), folder, folder.name)
  parts = [goals_table(machines, folder.name)]
  for machine, rows in machines.items():
    parts += [f'**{machine}**', peaks(rows), steps_table(rows), *notes(rows)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def goals_table(machines: Mapping[str, Rows], study: str) -> str:
  """Returns a table with one row for each goal, and the value that each machine reached."""
  wanted: dict[str, dict[str, str]] = {}
  for machine, rows in machines.items():
    for goal in accelerator_goals.goals(study, _device(rows)):
      text = f'{goal.what}, at most {goal.text(goal.most)}'
      wanted.setdefault(text, {})[machine] = reached(goal, rows)
  if not wanted:
    return ''
  table = [[text, *(row.get(m, ABSENT) for m in machines)] for text, row in wanted.items()]
  return tabulate(table, ['goal', *machines], tablefmt='pipe', disable_numparse=True)


def reached(goal: Goal, rows: Rows) -> str:
  """Returns the value that one machine reached and whether it meets the goal: `0.98 ×, met`."""
  value = rows[goal.row]['metrics'].get(goal.metric) if goal.row in rows else None
  if value is None:
    return 'not measured'
  return f'{goal.text(value)}, {"met" if value <= goal.most else "missed"}'


def peaks(rows: Rows) -> str:
  """Returns a sentence on the measured peak FLOP/s and bandwidth of the machine."""
  found = rows[accelerator_goals.PEAK]['metrics'] if accelerator_goals.PEAK in rows else {}
  if 'memory_per_s' not in found:
    return ''
  return (
    f'Measured peaks: matmul {1e-12 * found["bfloat16_per_s"]:.4g} TFLOP/s in bfloat16 and '
    f'{1e-12 * found["float32_per_s"]:.4g} TFLOP/s in float32, memory bandwidth '
    f'{1e-9 * found["memory_per_s"]:,.0f} GB/s.'
  )


def steps_table(rows: Rows) -> str:
  """Returns a table of the time, ratio, FLOPs, memory and energy of each step on one machine."""
  metrics = {name: line['metrics'] for name, line in rows.items()}
  steps = {
    name: found for name, found in metrics.items() if found.keys() & {'step_ms', 'decode_ms'}
  }
  shown = [cell for cell in CELLS if any(cell.text(found) != ABSENT for found in steps.values())]
  table = [[name, *(cell.text(found) for cell in shown)] for name, found in steps.items()]
  headings = ['step', *(cell.heading for cell in shown)]
  align = ['left', *('right' for _ in shown)]
  return tabulate(table, headings, tablefmt='pipe', disable_numparse=True, colalign=align)


def notes(rows: Rows) -> list[str]:
  """Returns sentences on first steps, on rows that were not measured, and on the total time."""
  said = []
  start = rows.get(accelerator_goals.START, {}).get('metrics', {})
  if start.get('cold_s') is not None:
    held = start.get('peak_memory')
    said.append(
      f'A new process ends its first step after {start["cold_s"]:.1f} s with an empty cache of '
      f'compiled programs, and after {start["warm_s"]:.1f} s with a filled one'
      + ('.' if held is None else f'; the peak of its allocator is {1e-9 * held:.2f} GB.')
    )
  if not any(line['metrics'].get('joules_per_token') for line in rows.values()):
    said.append('Energy was not measured, because no energy meter could be read.')
  dense = rows.get(accelerator_goals.DENSE, {}).get('metrics', {})
  if 'reference' in dense:
    said.append(f'Reference of the dense step: {dense["reference"]}.')
  said += [
    f'{name} was not measured: {rows[name]["message"]}.' for name in rows if _failed(rows, name)
  ]
  total = sum(line['metrics'].get('seconds', 0) for line in rows.values())
  return [' '.join([*said, f'The rows took {total:.0f} s together.'])]


def ratios(machines: Mapping[str, Rows], study: str) -> Figure:
  """Draws ratios of step times to those of their references, with quartiles, a line at 1, and goals."""
  names = list(dict.fromkeys(name for rows in machines.values() for name in _ratios(rows)))
  handles: list[Artist] = []
  with matplotlib.rc_context(style.RC):
    figure = style.figure(0.6 + 0.26 * len(names))
    axes = figure.add_subplot()
    for index, (machine, rows) in enumerate(machines.items()):
      apart = 0.5 * (index + 0.5 - len(machines) / 2) / len(machines)
      found = _ratios(rows)
      look = style.SERIES[index]
      axes.errorbar(
        [m['ratio'] for m in found.values()],
        [names.index(name) + apart for name in found],
        xerr=[
          [m['ratio'] - m['ratio_low'] for m in found.values()],
          [m['ratio_high'] - m['ratio'] for m in found.values()],
        ],
        label=machine,
        **style.marked(look, joined=False),
      )
      handles.append(style.handle(machine, look, joined=False))
      marked = {
        g.row: g.most for g in accelerator_goals.goals(study, _device(rows)) if g.metric == 'ratio'
      }
      places = [(most, names.index(row)) for row, most in marked.items() if row in names]
      if places:
        axes.plot(*zip(*places), **GOAL)
    axes.set_yticks(range(len(names)), [textwrap.fill(display(name), 26) for name in names])
    axes.invert_yaxis()
    axes.set(xlabel='step time / dense step time (×)\n(dense step: / PyTorch twin)')
    handles += [
      style.ratio_of_1(axes, vertical=True),
      Line2D([], [], label='goal: at most', **GOAL),
    ]
    style.legend(figure, [*handles, style.error_bar('median and quartiles')])
  return figure


def _ratios(rows: Rows) -> dict[str, Mapping[str, float]]:
  """Returns the metrics of the rows that compare a step with a reference, except the packed runs."""
  metrics = {name: line['metrics'] for name, line in rows.items()}
  return {
    name: found for name, found in metrics.items() if 'ratio' in found and 'runs' not in found
  }


def _failed(rows: Rows, name: str) -> bool:
  return 'failed' in rows[name]


def _device(rows: Rows) -> str:
  return next(iter(rows.values()))['env']['device']
