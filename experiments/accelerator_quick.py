"""Do the rows of `accelerator` run on a CPU, at sizes that take two minutes?

The dense step is timed beside the PyTorch twin at 4 layers of width 256, context 128, batch 32, in
float32 and two threads. The other rows have 2 layers of width 128 and batch 8, and each is timed beside
a dense step of that size. The packed runs are those of configs/shakespeare_char.py: 4 layers of width
128, context 64, batch 12.
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
  """The dense row first, at its own size and in a fresh process, then all other rows."""
  dense = BENCH.run(goals.DENSE, BENCH.dense_step)
  others = accelerator.rows(METHODS, PACKED, 4)
  return [dense, *(run for run in others if run.labels['row'] != goals.DENSE)]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the tables and the figure of this machine."""
  return accelerator_report.write(lines, folder)
