"""How fast are training steps on this GPU, beside its peak, a PyTorch twin and the dense step?

The study takes about four minutes on one H100 or H200. The model is that of the PyTorch twin: 12 layers
of width 768, 12 heads, context 1024, batch 16, vocabulary 50,304, LayerNorm, learned positions, squared
ReLU, an untied head. The most important rows come first.
"""

import functools
import pathlib

from experiments import accelerator_goals as goals
from experiments import accelerator_report
from experiments.accelerator_bench import Bench
from experiments.sweep import STE, Overrides, Run
from sparse_lm.report import results

SIZE = {
  'data.context': 1024,
  'data.batch': 16,
  'model.layers': 12,
  'model.width': 768,
  'model.hidden': 3072,
  'model.heads': 12,
  'model.kv_heads': 12,
  'model.norm': 'layernorm',
  'model.positions': 'learned',
  'model.precision': 'bfloat16',
}
SPARSITY = {'weight.sparsity': 0.9}
# Rows that measure a step beside the dense step, in the order of the study. `LATER` comes last.
STEPS: dict[str, Overrides] = {
  goals.STE: STE | SPARSITY,
  goals.STATIC: {'weight.name': 'static'} | SPARSITY,
  goals.RIGL: {'weight.name': 'rigl'} | SPARSITY,
  goals.EXPERTS: {'mlp.name': 'moe_topk', 'mlp.experts': 8, 'mlp.k': 1},
  goals.DEPTHS: {'depth.name': 'mixture_of_depths', 'depth.layers': '1::2'},
}
LATER: dict[str, Overrides] = {
  goals.MAGNITUDE: {'weight.name': 'magnitude'} | SPARSITY,
  goals.SET: {'weight.name': 'set'} | SPARSITY,
  goals.DEFAULT: {'model.norm': 'rmsnorm', 'model.positions': 'rotary'},
}
SMALL = 'configs/shakespeare_char.py'  # nanoGPT's CPU size
BENCH = Bench('configs/base.py', SIZE, 50304, 5, 9, 8192, 2_000_000_000)
PACKED = Bench(SMALL, {}, 65, 100, 9, 8192, 2_000_000_000)


def runs() -> list[Run]:
  """One run for each row."""
  return rows(BENCH, PACKED, 16)


def rows(bench: Bench, packed: Bench, count: int) -> list[Run]:
  """The rows at the size of `bench`, and one row of `count` packed runs at the size of `packed`."""
  return [
    bench.run(goals.PEAK, bench.peaks),
    bench.run(goals.DENSE, bench.dense_step),
    *(bench.step_run(row, overrides) for row, overrides in STEPS.items()),
    bench.run(goals.START, bench.first_step),
    packed.run(f'{count} packed runs', functools.partial(packed.packed, count)),
    *(bench.step_run(row, overrides) for row, overrides in LATER.items()),
  ]


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the tables and the figure of this machine."""
  return accelerator_report.write(lines, folder)
