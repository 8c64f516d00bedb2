"""Measures training steps at one size, each beside the dense step in one process.

A window is a number of steps that run without waiting for the device. Windows of a row take turns with
windows of the dense step. The programs of all missing rows are compiled at the same time. A row that
fails gets a line with `failed` and a `message`, and the study goes on. PyTorch and first steps run in
processes of their own.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.stages import Compiled, Lowered

from experiments import twin_process
from experiments.compiling import Together
from experiments.sweep import Overrides, Run
from experiments.train_step_speed import updates_per_step
from experiments.twin_process import BESIDE, ROOT, NoTwin
from sparse_lm.core import tree
from sparse_lm.core.errors import UserError
from sparse_lm.core.records import JsonObject
from sparse_lm.core.tree import Tree
from sparse_lm.layers.spec import precision_here
from sparse_lm.measure import energy, machine, turns
from sparse_lm.report import results
from sparse_lm.runs import configs, runtime
from sparse_lm.runs.build import build
from sparse_lm.runs.environment import environment
from sparse_lm.train import packed as packing
from sparse_lm.train.numbers import common, numbers
from sparse_lm.train.on_host import host_device
from sparse_lm.train.step import Program

Metrics = dict[str, float | str | None]
Measure = Callable[[Run, pathlib.Path], Metrics]
ENERGY_SECONDS = 1.0  # a GPU's energy meter is updated about ten times a second


def execute(measure: Measure, run: Run, workdir: pathlib.Path) -> JsonObject:
  """Measures a row. Returns the line's metrics, or the reason of a failure, and the seconds it took."""
  begin = time.perf_counter()
  runtime.prepare()
  found: JsonObject = {'metrics': {}}
  try:
    found['metrics'] = dict(measure(run, workdir))
  except Exception as error:  # whatever the error, the other rows are still measured
    reason = ' '.join(str(error).split())[:300]
    found |= {'failed': 'not measured', 'message': f'{type(error).__name__}: {reason}'}
    # `Together` keeps the error for other rows, and the traceback's frames hold the states of this row.
    error.__traceback__ = None
  found['metrics']['seconds'] = time.perf_counter() - begin
  print(said(run.labels['row'], found), flush=True)
  return found | {'config': _recorded(run), 'env': environment()}


def _recorded(run: Run) -> JsonObject:
  """A run's config, with the precision used on this device."""
  asked = configs.load(run.config, run.overrides).model.precision
  here = {'model.precision': precision_here(asked)}
  return configs.to_json(configs.load(run.config, run.overrides | here))


def said(row: str, found: JsonObject) -> str:
  """Formats the numbers of a row in one line."""
  if 'failed' in found:
    return f'{row}: {found["failed"]}: {found["message"]}'
  values = (
    f'{name} {value:.4g}' if isinstance(value, float | int) else f'{name} {value}'
    for name, value in found['metrics'].items()
    if value is not None
  )
  return f'{row}: {", ".join(values)}'


class Window:
  """A compiled step with its state. A call runs a window of steps.

  The constructor runs one step, so that loading the program is not measured.
  """

  def __init__(self, compiled: Compiled, state: Tree, steps: int, *inputs: Tree) -> None:
    self.compiled, self.inputs, self.steps = compiled, inputs, steps
    self.state, _ = jax.block_until_ready(compiled(state, *inputs))

  def __call__(self) -> Tree:
    """Runs the steps. Returns the state after them and the metrics of the last step."""
    for _ in range(self.steps):
      self.state, metrics = self.compiled(self.state, *self.inputs)
    return self.state, metrics


@dataclasses.dataclass(frozen=True)
class Rested(turns.Prepared):
  """A window that first waits until the twin's threads sleep; they spin for 0.2 s after their work."""

  window: Window

  def prepare(self) -> Tree:
    """Waits until the twin's threads sleep."""
    time.sleep(0.3)
    return ()

  def __call__(self) -> Tree:
    """Runs the window."""
    return self.window()


@dataclasses.dataclass(eq=False)
class Bench:
  """One model size and the rows that are measured at it.

  Attributes:
    config: path of the config file.
    overrides: overrides of the dense model.
    vocab: size of the vocabulary. Batches hold random tokens and lie on the device.
    window: number of steps in a window.
    repeats: number of turns.
    matmul: rows and columns of the matrices whose product gives the peak FLOP/s.
    copied: bytes of the array whose copy gives the peak bandwidth of the memory.
    planned: the runs that measure a step beside the dense step, by row.
    programs: by row ('' = the dense step) and kind: 'initial state', 'step', 'update' (of masks).
  """

  config: str
  overrides: Overrides
  vocab: int
  window: int
  repeats: int
  matmul: int
  copied: int
  planned: dict[str, Run] = dataclasses.field(default_factory=dict)
  programs: Together = dataclasses.field(default_factory=Together)

  def run(
    self, row: str, measure: Measure, overrides: Overrides | None = None, config: str = ''
  ) -> Run:
    """A run of a study that measures one row. `config` may name another config file."""
    fields = self.overrides | (overrides or {})
    return Run(config or self.config, fields, {'row': row}, functools.partial(execute, measure))

  def step_run(self, row: str, overrides: Overrides, config: str = '') -> Run:
    """A run that measures a step beside the dense step."""
    self.planned[row] = self.run(row, self.step, overrides, config)
    return self.planned[row]

  def program(self, run: Run) -> tuple[Program, Tree]:
    """Builds the program of a run's config. Returns it with the final densities."""
    return build(configs.load(run.config, run.overrides), self.vocab)

  @functools.cached_property
  def tokens(self) -> jax.Array:
    """A batch of random tokens, int32 `[B, L + 1]`."""
    data = configs.load(self.config, self.overrides).data
    return _random_tokens(self.vocab, data.batch, data.context + 1)

  def lower(self, workdir: pathlib.Path) -> None:
    """Traces the dense step, and the steps of all rows that the study of this workdir lacks."""
    file = workdir.parent.parent / 'runs.jsonl'
    finished = [line['run'] for line in results.read_file(file)] if file.exists() else []
    self._lower('', self._dense)
    for row, run in self.planned.items():
      if run.id(file.parent.name) not in finished:
        with contextlib.suppress(UserError):  # a config that is refused concerns its own row alone
          self._lower(row, run)

  def _lower(self, row: str, run: Run) -> None:
    """Traces the step of a row, and the step that updates masks if the method has one."""
    if (row, 'step') in self.programs:
      return

    def lowered(updates: bool) -> Lowered:
      program, target = self.program(run)
      step = program.mask_update_step if updates else program.train_step
      return step.lower(_placed(jax.eval_shape(program.init.compiled, 0, target)), self.tokens)

    def initial() -> Lowered:
      program, target = self.program(run)
      with jax.default_device(host_device()):
        return program.init.compiled.lower(0, jax.device_get(target))

    self.programs.lower((row, 'initial state'), initial)
    self.programs.lower((row, 'step'), lambda: lowered(False))
    program, _ = self.program(run)
    if updates_per_step(program.method, program.optimizer.steps):
      self.programs.lower((row, 'update'), lambda: lowered(True))

  @property
  def _dense(self) -> Run:
    return self.run('', self.dense_step)

  @functools.cached_property
  def dense(self) -> Window:
    """The dense step."""
    self._lower('', self._dense)
    (window,) = self._windows('', self._dense, ('step',)).values()
    return window

  def _windows(self, row: str, run: Run, kinds: Sequence[str]) -> dict[str, Window]:
    """Windows of a row's steps by kind, each with a state of its own."""
    make, given = self.programs.take((row, 'initial state')), jax.device_get(self.program(run)[1])
    place = jax.local_devices()[0]
    return {
      kind: Window(
        self.programs.take((row, kind)),
        jax.device_put(make(0, given), place),
        self.window,
        self.tokens,
      )
      for kind in kinds
    }

  @functools.cached_property
  def peak(self) -> dict[str, float]:
    """The peak FLOP/s of a large matmul by dtype, and the peak bandwidth of the memory in bytes/s."""
    products = {dtype: machine.matmul(self.matmul, dtype) for dtype in ('bfloat16', 'float32')}
    works = products | {'memory': machine.copy(self.copied)}
    calls = {name: _repeated(call, self.window) for name, (call, _) in works.items()}
    seconds = turns.interleaved(calls, self.repeats)
    return {
      name: self.window * work / float(np.median(seconds[name]))
      for name, (_, work) in works.items()
    }

  def peaks(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """Measures the peaks of the machine."""
    return {f'{name}_per_s': value for name, value in self.peak.items()}

  def dense_step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """Measures the dense step beside the PyTorch twin, or alone if PyTorch is not installed."""
    model, data = (configs.load(run.config, run.overrides)[part] for part in ('model', 'data'))
    sizes = {name: model[name] for name in ('layers', 'width', 'hidden', 'heads')}
    sizes |= {'context': data.context, 'batch': data.batch, 'vocab': self.vocab}
    try:
      with twin_process.running(sizes, self.window) as twin:
        self.lower(workdir)  # while PyTorch compiles
        # JAX times kernels on the device while it compiles, so the twin must have compiled before.
        begun = twin.read()
        calls = {'step': Rested(self.dense), 'twin': twin}
        self._check_parameters(begun['params'])
        seconds = turns.interleaved(calls, self.repeats, run.labels['row'])
        found = _beside(seconds['step'], seconds['twin'], self.window)
        found |= {'reference': f'torch {begun["torch"]}', 'reference_memory': twin.peak_memory}
    except NoTwin as error:
      self.lower(workdir)
      seconds = turns.interleaved({'step': self.dense}, self.repeats, run.labels['row'])
      found = {'reference': f'not measured: {error}'}
    return found | self._numbers(self.program(run)[0], {}, self.dense, seconds['step'])

  def _check_parameters(self, theirs: int) -> None:
    """Raises NoTwin if the twin has another number of parameters than the model."""
    ours = sum(leaf.size for leaf in jax.tree.leaves(self.dense.state.trainable['params']))
    if theirs != ours:
      raise NoTwin(f'it has {theirs} parameters and the model {ours}')

  def step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """Measures a step beside the dense step; the average includes the steps that update masks."""
    row = run.labels['row']
    self.lower(workdir)
    self._lower(row, run)  # even if the study has a line of this row
    program, target = self.program(run)
    updates = updates_per_step(program.method, program.optimizer.steps)
    calls = self._windows(row, run, ('step', 'update') if updates else ('step',))
    seconds = turns.interleaved(calls | {'reference': self.dense}, self.repeats, row)
    average, found = seconds['step'], {}
    if updates:
      average = (1 - updates) * average + updates * seconds['update']
      found = {
        'update_ms': 1e3 * float(np.median(seconds['update'])) / self.window,
        'update_memory': machine.peak_memory(calls['update'].compiled),
        'updates_per_step': updates,
      }
    found |= _beside(average, seconds['reference'], self.window)
    final = {path: float(density) for path, density in tree.named(target).items()}
    return found | self._numbers(program, final, calls['step'], average)

  def _numbers(
    self, program: Program, final: dict[str, float], window: Window, seconds: np.ndarray
  ) -> Metrics:
    """The time, FLOPs, memory and energy of a step."""
    found, tokens = _milliseconds(seconds, self.window), self.tokens[:, 1:].size
    flops = program.step_flops(0, program.costs.training_pass({}), final) * tokens
    flops_per_s = 1e3 * flops / found['step_ms']
    joules = _joules(window)
    return found | {
      'tokens_per_second': 1e3 * tokens / found['step_ms'],
      'flops_per_s': flops_per_s,
      'fraction_of_peak': flops_per_s / self.peak[program.model.spec.compute.name],
      'peak_memory': machine.peak_memory(window.compiled),
      'joules_per_token': None if joules is None else joules / tokens,
    }

  def packed(self, count: int, run: Run, workdir: pathlib.Path) -> Metrics:
    """Measures a step of `count` packed runs with different seeds, beside the step of one run."""
    program, target = self.program(run)
    states = packing.stack([program.init(seed, target) for seed in range(count)])
    batch, length = self.tokens.shape
    values = {name: np.full(count, value, 'f') for name, value in numbers(program).items()}
    starts = np.random.default_rng(0).integers(0, 10 * length, (self.window, count, batch))
    text = _random_tokens(self.vocab, 1, 100 * length)[0]
    feed = packing.Feed(text, *jax.device_put((values, np.int32(0), starts.astype('i'))))
    step = packing.PackedProgram(common(program)).steps(((), ()))
    self._lower('', self._dense)
    self.programs.lower((run.labels['row'], 'step'), lambda: step.lower(states, feed))
    reference = self.dense
    packed = Window(self.programs.take((run.labels['row'], 'step')), states, self.window, feed)
    seconds = turns.interleaved({'step': packed, 'reference': reference}, self.repeats)
    found = _milliseconds(seconds['step'], self.window)
    found |= _beside(seconds['step'], seconds['reference'], self.window)
    return found | {
      'tokens_per_second': 1e3 * count * self.tokens[:, 1:].size / found['step_ms'],
      'peak_memory': machine.peak_memory(packed.compiled),
      'runs': count,
    }

  def first_step(self, run: Run, workdir: pathlib.Path) -> Metrics:
    """Times a new process to the end of its first step, with an empty and with a filled cache."""
    asked = {'config': run.config, 'overrides': run.overrides, 'vocab': self.vocab}
    with tempfile.TemporaryDirectory() as cache:
      cold, warm = _process_seconds(asked, cache), _process_seconds(asked, cache)
    return {'cold_s': cold[0], 'warm_s': warm[0], 'peak_memory': cold[1]}


def _placed(shapes: Tree) -> Tree:
  """Shape structs with the sharding that initial states have on the device."""
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
  )


def _random_tokens(vocab: int, batch: int, length: int) -> jax.Array:
  """Random tokens, int32 `[B, L]` on the device. NumPy draws them, so that nothing is compiled."""
  return jax.device_put(np.random.default_rng(0).integers(0, vocab, (batch, length)).astype('i'))


def _repeated(call: Callable[[], Tree], times: int) -> Callable[[], Tree]:
  """Returns a function that calls `call` `times` times and returns the last result."""

  def run() -> Tree:
    for _ in range(times - 1):
      call()
    return call()

  return run


def _milliseconds(seconds: np.ndarray, steps: int) -> Metrics:
  """The median time of a step and its quartiles, from the times of windows of `steps` steps."""
  low, middle, high = (1e3 * float(q) / steps for q in np.percentile(seconds, (25, 50, 75)))
  return {'step_ms': middle, 'step_ms_low': low, 'step_ms_high': high}


def _beside(seconds: np.ndarray, reference: np.ndarray, steps: int) -> Metrics:
  found: Metrics = {'reference_ms': 1e3 * float(np.median(reference)) / steps}
  return turns.ratio(seconds, reference) | found


def _joules(window: Window) -> float | None:
  """The energy of a step in joules; `None` if no energy meter can be read."""
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
  """Times `experiments.first_step` from its start to its report. Also returns its peak memory.

  Raises RuntimeError if the process fails.
  """
  env = os.environ | BESIDE | {'XDG_CACHE_HOME': cache}
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
