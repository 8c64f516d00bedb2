"""Do the rows of the study `accelerator` run, at sizes that a CPU measures in two minutes?

The dense step stands beside the PyTorch twin at 4 layers of width 256, context 128, batch 32 in float32
and two threads. All other rows are of 2 layers of width 128, batch 8, each beside its own dense step,
but for that of packed runs, which are those of configs/shakespeare_char.py: 4 layers of width 128,
context 64, batch 12.
"""

import pathlib

from experiments import accelerator, accelerator_report
from experiments import accelerator_goals as goals
from experiments.accelerator_bench import Bench
from experiments.sweep import Run
from sparse_lm.report import results

TWIN = {'model.norm': 'layernorm', 'model.positions': 'learned'}
SMALL = TWIN | {
  'data.batch': 8,
  'model.layers': 2,
  'model.width': 128,
  'model.hidden': 512,
}
BENCH = Bench('configs/base.py', TWIN, 256, 2, 5, 1024, 200_000_000)
METHODS = Bench('configs/base.py', SMALL, 256, 4, 4, 1024, 200_000_000)
PACKED = Bench(accelerator.SMALL, {}, 65, 4, 3, 1024, 200_000_000)


def runs() -> list[Run]:
  """The dense row at a size of its own, in a process that did nothing before, then all others."""
  dense = BENCH.run(goals.DENSE, BENCH.dense_step)
  others = accelerator.rows(METHODS, PACKED, 4)
  return [dense, *(run for run in others if run.labels['row'] != goals.DENSE)]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """The tables and the figure of this machine."""
  return accelerator_report.write(lines, folder)
