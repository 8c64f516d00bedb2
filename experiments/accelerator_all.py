"""How much time does every method add to a training step, and how long do whole runs take on this GPU?

The study measures what `accelerator` omits for time: the step of every config at 4 layers of width 768,
context 1024, batch 16, beside the dense step; packed models beside their dense twins; and two complete
trainings on tiny Shakespeare, nanoGPT's GPU setting and a study of packed runs. Place char-rnn's text
at data/tiny_shakespeare.txt first.
"""

import functools
import os
import pathlib
import subprocess
import sys
import time

from experiments import accelerator, accelerator_report, packed_speed, packed_sweep
from experiments import accelerator_goals as goals
from experiments.accelerator_bench import Bench, Metrics, execute
from experiments.sweep import Run
from experiments.twin_process import BESIDE, ROOT
from sparse_lm.report import results
from sparse_lm.runs import configs

SIZE = accelerator.SIZE | {'model.layers': 4, 'model.norm': 'rmsnorm', 'model.positions': 'rotary'}
BENCH = Bench('configs/base.py', SIZE, 50304, 5, 9, 8192, 2_000_000_000)
CONFIGS = ROOT / 'configs'
# Configs of other models, or of runs that start from the weights of another run.
LEFT_OUT = ('base', 'tiny', 'ablation', 'sparsity_vs_accuracy', 'fine_tune')
# At this vocabulary the head alone takes 0.53 of the FLOPs, more than two budgets, and a table of bigrams
# has 2.5 billion weights, which do not fit a GPU with their moments.
EASED = {
  'hybrid': {'budget.target': 0.8},
  'l0': {'budget.target': 0.8},
  'weight_sparse': {'model.bigram': False},
}
GPU_SETTING = 'configs/shakespeare_char_gpu.py'
DECODED = ('dense', 'shrink: half of the neurons and heads', 'blocks of 128, 90 %')


def runs() -> list[Run]:
  """Returns whole runs, then packed models, then one row for each config."""
  study = Run(accelerator.SMALL, {}, {'row': goals.STUDY}, functools.partial(execute, _study))
  nanogpt = Run(GPU_SETTING, {}, {'row': goals.NANOGPT}, functools.partial(execute, _train))
  packed = {run.labels['model']: run for run in packed_speed.runs()}
  return [
    nanogpt,
    study,
    *(
      Run(
        packed[model].config, packed[model].overrides, {'row': f'packed, {model}'}, _packed(model)
      )
      for model in DECODED
    ),
    *(BENCH.step_run(name, EASED.get(name, {}), f'configs/{name}.py') for name in method_configs()),
  ]


def method_configs() -> list[str]:
  """The names of the config files with a method."""
  names = sorted(file.stem for file in CONFIGS.glob('[a-z]*.py'))
  return [name for name in names if name not in LEFT_OUT and not name.startswith('shakespeare')]


def _train(run: Run, workdir: pathlib.Path) -> Metrics:
  """Trains a config to the end."""
  from sparse_lm.runs.loop import train

  begin = time.perf_counter()
  metrics = train(configs.load(run.config, run.overrides), str(workdir))['metrics']
  return {
    'total_s': time.perf_counter() - begin,
    **{name: metrics[name] for name in ('best_val_loss', 'val_loss', 'train_step_ms')},
  }


def _study(run: Run, workdir: pathlib.Path) -> Metrics:
  """Trains the runs of `packed_sweep` as packs, in a process of its own.

  Raises RuntimeError if the process fails.
  """
  command = [sys.executable, '-m', 'experiments.run', 'packed_sweep', '--pack']
  begin = time.perf_counter()
  command.append(f'--results={workdir}')
  done = subprocess.run(command, env=os.environ | BESIDE, cwd=ROOT, capture_output=True, text=True)
  seconds = time.perf_counter() - begin
  if done.returncode:
    raise RuntimeError(f'packed_sweep ended: {done.stderr.strip()[-200:]}')
  return {'total_s': seconds, 'runs': len(packed_sweep.runs())}


def _packed(model: str) -> functools.partial:
  """Returns a function that measures a packed model as `packed_speed` does."""

  def measure(run: Run, workdir: pathlib.Path) -> Metrics:
    row = Run(run.config, run.overrides, {'model': model})
    return packed_speed.execute(row, workdir)['metrics']

  return functools.partial(execute, measure)


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the tables and the figure of this machine."""
  return accelerator_report.write(lines, folder)
