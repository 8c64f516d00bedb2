"""Training steps measured at one size, each beside the dense step in one process.

Windows of steps run without waiting for the device and take turns with windows of the dense step, whose
program is compiled once. What failed is a line too, with `failed` and a `message`, and the rows after it
go on. PyTorch and first steps run in processes of their own.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.stages import Compiled, Wrapped

from experiments.sweep import Overrides, Run
from experiments.train_step_speed import updates_per_step
from sparse_lm.core import tree
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.measure import energy, machine, turns
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.arithmetic import resolved
from sparse_lm.runs.build import build
from sparse_lm.runs.environment import environment
from sparse_lm.train.step import Program

ROOT = pathlib.Path(__file__).resolve().parents[1]
Metrics = dict[str, float | str | None]
Measure = Callable[[Run, pathlib.Path], Metrics]
ENERGY_SECONDS = 1.0  # the meter of a GPU moves some ten times a second


def execute(measure: Measure, run: Run, workdir: pathlib.Path) -> JsonObject:
  """A line's contents: what `measure` finds, or that it failed and why, and the seconds that it took."""
  begin = time.perf_counter()
  runtime.prepare()
  found: JsonObject = {'metrics': {}}
  try:
    found['metrics'] = dict(measure(run, workdir))
  except Exception as error:  # whatever one row meets, the others are measured
    reason = ' '.join(str(error).split())[:300]
    found |= {'failed': 'not measured', 'message': f'{type(error).__name__}: {reason}'}
  found['metrics']['seconds'] = time.perf_counter() - begin
  print(said(run.labels['row'], found), flush=True)
  return found | {
    'config': configs.to_json(resolved(configs.load(run.config))),
    'env': environment(),
  }


def said(row: str, found: JsonObject) -> str:
  """A row's numbers in one line."""
  if 'failed' in found:
    return f'{row}: {found["failed"]}: {found["message"]}'
  values = (
    f'{name} {value:.4g}' if isinstance(value, float | int) else f'{name} {value}'
    for name, value in found['metrics'].items()
    if value is not None
  )
  return f'{row}: {", ".join(values)}'


class Window:
  """A compiled step that carries its state; a call runs some steps without waiting for the device."""

  def __init__(
    self, step: Wrapped, make: Callable[[], Tree], tokens: jax.Array, steps: int
  ) -> None:
    state = jax.block_until_ready(make())
    begin = time.perf_counter()
    self.compiled: Compiled = step.lower(state, tokens).compile()
    self.state, self.tokens, self.steps = state, tokens, 1
    jax.block_until_ready(self())
    self.first_step_s = time.perf_counter() - begin  # tracing and compilation too
    self.steps = steps

  def __call__(self) -> Tree:
    """The state after the steps, and the metrics of the last."""
    for _ in range(self.steps):
      self.state, metrics = self.compiled(self.state, self.tokens)
    return self.state, metrics


class NoTwin(Exception):
  """Why the PyTorch twin cannot be measured."""


class Twin:
  """The process of `experiments.torch_twin`; a call runs a window of its steps and waits for them."""

  def __init__(self, sizes: Mapping[str, int], steps: int, errors: pathlib.Path) -> None:
    self.steps, self.errors, self.peak_memory = steps, errors, None
    command = [sys.executable, '-m', 'experiments.torch_twin']
    with errors.open('w') as file:
      self.process = subprocess.Popen(
        [*command, *(f'--{name}={size}' for name, size in sizes.items())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=file,
        text=True,
        cwd=ROOT,
      )

  def read(self) -> JsonObject:
    """The next line that it prints. Raises NoTwin where the process has ended."""
    line = self.process.stdout.readline()
    if not line:
      said_last = self.errors.read_text().strip().splitlines()[-1:]
      raise NoTwin(f'experiments.torch_twin ended: {" ".join(said_last)}')
    return json.loads(line)

  def __call__(self) -> float:
    """Seconds of a window."""
    self.process.stdin.write(f'{self.steps}\n')
    self.process.stdin.flush()
    found = self.read()
    self.peak_memory = found['peak_memory']
    return found['seconds']


@contextlib.contextmanager
def _twin(sizes: Mapping[str, int], steps: int) -> Iterator[Twin]:
  """The twin's process while it is needed. Raises NoTwin without PyTorch."""
  if importlib.util.find_spec('torch') is None:
    raise NoTwin('PyTorch is not installed')
  with tempfile.TemporaryDirectory() as folder:
    twin = Twin(sizes, steps, pathlib.Path(folder) / 'errors')
    try:
      yield twin
    finally:
      twin.process.kill()
      twin.process.wait()


@dataclasses.dataclass(frozen=True)
class Bench:
  """One size, and the rows that are measured at it. What rows share is made when first asked for.

  Attributes:
    config: path of a config file.
    overrides: of the dense model.
    vocab: tokens of the vocabulary; batches are random ones, on the device.
    window: steps that run without waiting.
    repeats: turns that are measured.
    matmul: rows and columns of the products that give the peak.
    copied: bytes of the array whose copy gives the memory's bandwidth.
  """

  config: str
  overrides: tuple[tuple[str, int | str], ...]
  vocab: int
  window: int
  repeats: int
  matmul: int
  copied: int

  def run(
    self, row: str, measure: Measure, overrides: Overrides | None = None, config: str = ''
  ) -> Run:
    """A run of a study that measures one row, of another config file where one is named."""
    fields = dict(self.overrides) | (overrides or {})
    return Run(config or self.config, fields, {'row': row}, functools.partial(execute, measure))

  def program(self, run: Run) -> tuple[Program, Tree]:
    """What a run's config describes, and its final densities."""
    return build(configs.load(run.config, run.overrides), self.vocab)

  @functools.cached_property
  def tokens(self) -> jax.Array:
    """A batch, int32 `[B, L + 1]`."""
    data = configs.load(self.config, dict(self.overrides)).data
    return jax.random.randint(jax.random.key(0), (data.batch, data.context + 1), 0, self.vocab)

  @functools.cached_property
  def dense(self) -> Window:
    """The dense step."""
    program, target = build(configs.load(self.config, dict(self.overrides)), self.vocab)
    make = functools.partial(program.init, 0, target)
    return Window(program.train_step, make, self.tokens, self.window)

  @functools.cached_property
  def peak(self) -> dict[str, float]:
    """FLOP/s of the largest products by dtype, and bytes a second of the memory."""
    products = {dtype: machine.matmul(self.matmul, dtype) for dtype in ('bfloat16', 'float32')}
    works = products | {'memory': machine.copy(self.copied)}
    calls = {name: _repeated(call, self.window) for name, (call, _) in works.items()}
    seconds = turns.interleaved(calls, self.repeats)
    return {
      name: self.window * work / float(np.median(seconds[name]))
      for name, (_, work) in works.items()
    }

  def peaks(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """What the machine reaches at best."""
    return {f'{name}_per_s': value for name, value in self.peak.items()}

  def dense_step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """The dense step beside the PyTorch twin, if PyTorch is there."""
    model, data = (configs.load(run.config, run.overrides)[part] for part in ('model', 'data'))
    sizes = {name: model[name] for name in ('layers', 'width', 'hidden', 'heads')}
    sizes |= {'context': data.context, 'batch': data.batch, 'vocab': self.vocab}
    calls: dict[str, Callable[[], Tree]] = {'step': self.dense}
    try:
      with _twin(sizes, self.window) as twin:
        found = self._begun(twin)
        seconds = turns.interleaved(calls | {'twin': twin}, self.repeats, run.labels['row'])
        found |= _beside(seconds['step'], seconds['twin'], self.window)
        found['reference_memory'] = twin.peak_memory
    except NoTwin as error:
      seconds = turns.interleaved(calls, self.repeats, run.labels['row'])
      found = {'reference': f'not measured: {error}'}
    return found | self._numbers(self.program(run)[0], {}, self.dense, seconds['step'])

  def _begun(self, twin: Twin) -> Metrics:
    """What the twin says when it has done its first step. Raises NoTwin for another model."""
    said_first = twin.read()
    ours = sum(leaf.size for leaf in jax.tree.leaves(self.dense.state.trainable['params']))
    if said_first['params'] != ours:
      raise NoTwin(f'it has {said_first["params"]} parameters and the model {ours}')
    name = f'torch {said_first["torch"]}'
    return {'reference': name, 'reference_first_step_s': said_first['first_step_s']}

  def step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """A step beside the dense one. One that updates masks now and then counts its updates in."""
    program, target = self.program(run)
    make = functools.partial(program.init, 0, target)
    calls = {'step': Window(program.train_step, make, self.tokens, self.window)}
    updates = updates_per_step(program.method, program.optimizer.steps)
    if updates:
      calls['update'] = Window(program.mask_update_step, make, self.tokens, self.window)
    seconds = turns.interleaved(calls | {'reference': self.dense}, self.repeats, run.labels['row'])
    average, found = seconds['step'], {}
    if updates:
      average = (1 - updates) * average + updates * seconds['update']
      found = {
        'update_ms': 1e3 * float(np.median(seconds['update'])) / self.window,
        'update_memory': machine.peak_memory(calls['update'].compiled),
        'update_first_step_s': calls['update'].first_step_s,
        'updates_per_step': updates,
      }
    found |= _beside(average, seconds['reference'], self.window)
    final = {path: float(density) for path, density in tree.named(target).items()}
    return found | self._numbers(program, final, calls['step'], average)

  def _numbers(
    self, program: Program, final: dict[str, float], window: Window, seconds: np.ndarray
  ) -> Metrics:
    """Of a step's own: its time, FLOPs, memory, start and energy."""
    found, tokens = _milliseconds(seconds, self.window), self.tokens[:, 1:].size
    flops = program.step_flops(0, program.costs.training_pass({}), final) * tokens
    flops_per_s = 1e3 * flops / found['step_ms']
    joules = _joules(window)
    return found | {
      'tokens_per_second': 1e3 * tokens / found['step_ms'],
      'flops_per_s': flops_per_s,
      'fraction_of_peak': flops_per_s / self.peak[program.model.spec.compute.name],
      'peak_memory': machine.peak_memory(window.compiled),
      'first_step_s': window.first_step_s,
      'joules_per_token': None if joules is None else joules / tokens,
    }

  def packed(self, count: int, run: Run, workdir: pathlib.Path) -> Metrics:
    """So many runs that differ in their seeds, vmapped into one step, beside one run alone."""
    program, target = self.program(run)
    init = jax.vmap(lambda seed: program.init(seed, target))
    step = jax.jit(jax.vmap(program.transition), donate_argnums=0)
    tokens = jax.numpy.broadcast_to(self.tokens, (count, *self.tokens.shape))
    packed = Window(step, lambda: init(jax.numpy.arange(count)), tokens, self.window)
    calls = {'step': packed, 'reference': self.dense}
    seconds = turns.interleaved(calls, self.repeats, run.labels['row'])
    found = _milliseconds(seconds['step'], self.window)
    found |= _beside(seconds['step'], seconds['reference'], self.window)
    return found | {
      'tokens_per_second': 1e3 * tokens[..., 1:].size / found['step_ms'],
      'peak_memory': machine.peak_memory(packed.compiled),
      'first_step_s': packed.first_step_s,
      'runs': count,
    }

  def first_step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """Wall time of a new process to the end of its first step, with nothing compiled, and again."""
    asked = {'config': run.config, 'overrides': run.overrides, 'vocab': self.vocab}
    with tempfile.TemporaryDirectory() as cache:
      cold, warm = _process_seconds(asked, cache), _process_seconds(asked, cache)
    return {'cold_s': cold[0], 'warm_s': warm[0], 'peak_memory': cold[1]}


def _repeated(call: Callable[[], Tree], times: int) -> Callable[[], Tree]:
  """Calls one after the other, of which the last result is waited for."""

  def run() -> Tree:
    for _ in range(times - 1):
      call()
    return call()

  return run


def _milliseconds(seconds: np.ndarray, steps: int) -> Metrics:
  """The median time of a step and its quartiles, from windows of so many."""
  low, middle, high = (1e3 * float(q) / steps for q in np.percentile(seconds, (25, 50, 75)))
  return {'step_ms': middle, 'step_ms_low': low, 'step_ms_high': high}


def _beside(seconds: np.ndarray, reference: np.ndarray, steps: int) -> Metrics:
  found: Metrics = {'reference_ms': 1e3 * float(np.median(reference)) / steps}
  return turns.ratio(seconds, reference) | found


def _joules(window: Window) -> float | None:
  """Of a step; `None` where no meter can be read."""
  with energy.meter() as measured:
    pass
  if measured.joules is None:
    return None
  begin, steps = time.perf_counter(), 0
  with energy.meter() as measured:
    while time.perf_counter() - begin < ENERGY_SECONDS:
      jax.block_until_ready(window())
      steps += window.steps
  return measured.joules / steps


def _process_seconds(asked: JsonObject, cache: str) -> tuple[float, int | None]:
  """From the start of `experiments.first_step` to its report, and the peak memory in that.

  Raises RuntimeError where the process fails.
  """
  # This process may hold most of a GPU's memory, so the new one takes what it needs and no more.
  env = os.environ | {'XDG_CACHE_HOME': cache, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  command = [sys.executable, '-m', 'experiments.first_step', json.dumps(asked)]
  with tempfile.TemporaryFile('w+') as errors:
    begin = time.perf_counter()
    process = subprocess.Popen(
      command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    line = process.stdout.readline()
    seconds = time.perf_counter() - begin
    if process.wait() or not line:
      errors.seek(0)
      raise RuntimeError(f'experiments.first_step ended: {errors.read().strip()[-200:]}')
  return seconds, json.loads(line)['peak_memory']
