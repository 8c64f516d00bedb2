"""What does every method add to a training step, and what do whole runs take on this GPU?

What the study `accelerator` leaves out for time: a step of every config at 4 layers of width 768, context
1024, batch 16, beside the dense one; packed models beside their dense twins; and nanoGPT's GPU setting,
trained whole (on the text of tiny Shakespeare, where you placed it).
"""

import functools
import pathlib
import time

from experiments import accelerator, accelerator_report, packed_speed
from experiments import accelerator_goals as goals
from experiments.accelerator_bench import Bench, Metrics, execute
from experiments.sweep import Run
from sparse_lm.report import results
from sparse_lm.runs import configs

SIZE = accelerator.SIZE | {'model.layers': 4, 'model.norm': 'rmsnorm', 'model.positions': 'rotary'}
BENCH = Bench('configs/base.py', tuple(SIZE.items()), 50304, 5, 9, 8192, 2_000_000_000)
CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
# Configs of other models, or of runs that start from other ones.
LEFT_OUT = ('base', 'tiny', 'ablation', 'fine_tune')
GPU_SETTING = 'configs/shakespeare_char_gpu.py'
DECODED = ('dense', 'shrink: half of the neurons and heads', 'blocks of 128, 90 %')


def runs() -> list[Run]:
  """Whole runs, then packed models, then a row for each config."""
  nanogpt = Run(GPU_SETTING, {}, {'row': goals.NANOGPT}, functools.partial(execute, _train))
  packed = {run.labels['model']: run for run in packed_speed.runs()}
  return [
    nanogpt,
    *(
      Run(
        packed[model].config, packed[model].overrides, {'row': f'packed, {model}'}, _packed(model)
      )
      for model in DECODED
    ),
    *(BENCH.run(name, BENCH.step, config=f'configs/{name}.py') for name in method_configs()),
  ]


def method_configs() -> list[str]:
  """The names of the config files that hold a method."""
  names = sorted(file.stem for file in CONFIGS.glob('[a-z]*.py'))
  return [name for name in names if name not in LEFT_OUT and not name.startswith('shakespeare')]


def _train(run: Run, workdir: pathlib.Path) -> Metrics:
  """Trains a config whole."""
  from sparse_lm.runs.loop import train

  begin = time.perf_counter()
  metrics = train(configs.load(run.config, run.overrides), str(workdir))['metrics']
  return {
    'total_s': time.perf_counter() - begin,
    **{name: metrics[name] for name in ('best_val_loss', 'val_loss', 'train_step_ms')},
  }


def _packed(model: str) -> functools.partial:
  """What measures a packed model as `packed_speed` does."""

  def measure(run: Run, workdir: pathlib.Path) -> Metrics:
    row = Run(run.config, run.overrides, {'model': model})
    return packed_speed.execute(row, workdir)['metrics']

  return functools.partial(execute, measure)


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """The tables and the figure of this machine."""
  return accelerator_report.write(lines, folder)
