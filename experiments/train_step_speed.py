"""How long does a training step take, beside a plain Flax model and beside the dense step?

Every row is timed in turns with its reference in one process (4 layers, width 256, context 128, batch
32). Ratios are medians over the turns, with quartiles. The step of a weight method is the average over
an update period and includes the updates of the masks. Training applies masks, so sparse weights save
no time here. Routers of fixed capacity compute less in training too; learned gates compute everything.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from experiments import plain_twin
from experiments.sweep import FLOAT32, STE, Run
from sparse_lm.core import tree
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.measure import machine, turns
from sparse_lm.report import categories, plot, results, table
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.build import build
from sparse_lm.runs.environment import environment
from sparse_lm.train.step import Program
from sparse_lm.weights.method import WeightMethod

CONFIG = 'configs/base.py'
VOCAB = 256
REPEATS = 12
TWIN, DENSE = 'plain Flax twin', 'default model'
SPARSITY = 0.9
# The experts of this row are as large as the MLP that they replace, so its active FLOPs are equal.
GATED = {
  'statistical_topk, 12.5 %': {'activation.name': 'statistical_topk'},
  'topk, 12.5 %': {'activation.name': 'topk'},
  'moe_topk, 1 of 8': {'mlp.name': 'moe_topk'},
  'mixture_of_depths, 12.5 % of every second layer': {
    'depth.name': 'mixture_of_depths',
    'depth.layers': '1::2',
  },
  'token_gate': {'depth.name': 'token_gate'},
  'token_gate, reinforce': {'depth.name': 'token_gate', 'depth.estimator': 'reinforce'},
}
METHODS = {name: {'weight.name': name} for name in ('static', 'magnitude', 'set', 'rigl')}
METHODS['ste'] = STE
GELU = {'activation.name': 'gelu'}


def runs() -> list[Run]:
  """Dense models beside the plain Flax model, then all methods beside the default dense model."""
  dense = [
    Run(CONFIG, GELU, {'step': 'default model with erf GELU', 'reference': TWIN}, execute),
    Run(CONFIG, {}, {'step': DENSE, 'reference': TWIN}, execute),
  ]
  sparse = [
    Run(CONFIG, fields | {'weight.sparsity': SPARSITY}, {'step': name, 'reference': DENSE}, execute)
    for name, fields in METHODS.items()
  ]
  gated = [
    Run(CONFIG, overrides, {'step': step, 'reference': DENSE}, execute)
    for step, overrides in GATED.items()
  ]
  return dense + sparse + gated


class _Stepper:
  """A compiled step that carries its state from call to call."""

  def __init__(self, step: Callable, state: Tree, tokens: np.ndarray) -> None:
    self.compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    self.state, self.tokens = state, tokens

  def __call__(self) -> Tree:
    self.state, metrics = self.compiled(self.state, self.tokens)
    return self.state, metrics


def execute(run: Run, workdir: pathlib.Path) -> JsonObject:
  """Times the step of one row in turns with its reference."""
  runtime.prepare()
  config = configs.load(run.config, run.overrides | FLOAT32)
  program, target = build(config, VOCAB)
  shape = (config.data.batch, config.data.context + 1)
  tokens = np.random.default_rng(0).integers(0, VOCAB, shape).astype(np.int32)
  make = functools.partial(program.init, 0, target)
  calls = {'step': _Stepper(program.transition, make(), tokens)}
  updates = updates_per_step(program.method, program.optimizer.steps)
  if updates:
    every = tuple(program.method.parts)
    calls['update'] = _Stepper(functools.partial(program.transition, updates=every), make(), tokens)
  calls['reference'] = _reference(run.labels['reference'], program, tokens)
  calls['peak'], peak_flops = machine.matmul()
  seconds = turns.interleaved(calls, REPEATS, run.labels['step'])
  average = seconds['step']
  if updates:
    average = (1 - updates) * average + updates * seconds['update']
  final = {path: float(density) for path, density in tree.named(target).items()}
  flops = program.step_flops(0, program.costs.training_pass({}), final)
  peak = peak_flops / np.median(seconds['peak'])
  metrics = {
    'step_ms': 1e3 * float(np.median(average)),
    'reference_ms': 1e3 * float(np.median(seconds['reference'])),
    **turns.ratio(average, seconds['reference']),
    'fraction_of_peak': float(flops * tokens[:, 1:].size / np.median(average) / peak),
    'peak_gflops': float(peak / 1e9),
    'peak_memory': machine.peak_memory(calls['step'].compiled),
    'reference_memory': machine.peak_memory(calls['reference'].compiled),
  }
  return {'metrics': metrics, 'config': configs.to_json(config), 'env': environment()}


def updates_per_step(method: WeightMethod, steps: int) -> float:
  """The share of steps that update masks, in the middle of the run."""
  middle = range(steps // 2 - 50, steps // 2 + 50)
  return sum(method.due(step) for step in middle) / len(middle)


def _reference(name: str, program: Program, tokens: np.ndarray) -> _Stepper:
  if name == TWIN:
    state = plain_twin.create(program.model.spec, program.tx, seed=0)
    return _Stepper(plain_twin.train_step, state, tokens)
  dense, target = build(configs.load(CONFIG, FLOAT32), VOCAB)
  return _Stepper(dense.transition, dense.init(0, target), tokens)


def report(lines: list[results.Line], folder: pathlib.Path) -> str:
  """Writes the table, and a bar chart of the ratios."""
  columns = [
    table.Column('step_ms', 'step', '.0f', 'ms'),
    table.Column('reference_ms', 'reference', '.0f', 'ms'),
    *table.ratio('ratio', 'step / reference', '.3f'),
    table.Column('fraction_of_peak', 'dense FLOP/s / matmul peak', '.2f', '×'),
    table.Column('peak_gflops', 'matmul peak', '.0f', 'GFLOP/s'),
    table.Column('peak_memory', 'peak memory of the step', ',.0f', 'MB', 1e-6),
    table.Column('reference_memory', 'peak memory of the reference', ',.0f', 'MB', 1e-6),
  ]
  frame = table.summarise(lines, ['step', 'reference'], columns)
  caption = (
    'Training step, float32, 4 layers, width 256, context 128, batch 32, weight methods at '
    f'{SPARSITY:.0%} sparsity; medians of {REPEATS} turns, with quartiles of the ratio over the turns'
  )
  ratio = table.Column('ratio', 'step time / time of the reference', unit='×')
  figure = categories.bars(lines, 'step', ratio, 'ratio_low', 'ratio_high', 'reference')
  plot.save(figure, folder, 'train_step_speed')
  return table.write(frame, folder, caption, 'python -m experiments.run train_step_speed')
