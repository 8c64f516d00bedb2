"""Step times leave out what is no step: compilation, evaluation and saving."""

import json

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.runs import loop, timing
from sparse_lm.runs.checkpoint import Checkpoints
from sparse_lm.runs.loop import train
from sparse_lm.train.step import Program
from sparse_lm.train.work import Meter


@pytest.fixture
def clock(monkeypatch):
  """A clock that moves by hand: `clock(seconds)`."""
  now = [0.0]

  def advance(seconds):
    now[0] += seconds

  monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
  return advance


def test_a_step_that_compiles_is_left_out(clock):
  functions = [jax.jit(lambda x, k=k: x + k) for k in range(2)]
  timer = timing.StepTimer()
  # The second function compiles at the fourth step; the two steps before it were not waited for.
  for which, seconds in ((0, 100.0), (0, 1.0), (0, 1.0), (1, 200.0), (0, 2.0), (1, 4.0)):
    clock(seconds)
    timer.step(functions[which](jnp.float32(1)))
  timer.stop()
  assert timer.take() == 3.0
  assert timer.take() is None
  for seconds in (5.0, 7.0):
    timer.start()
    clock(seconds)
    timer.step(functions[0](jnp.float32(1)))
    timer.stop()
    clock(1000.0)  # between two spans
  assert timer.take() == 6.0


def test_another_shape_compiles_again_and_is_left_out(clock):
  function = jax.jit(lambda x: x * 2)
  timer = timing.StepTimer()
  for shape in (3, 3, 5, 5):
    clock(1.0 if function._cache_size() else 100.0)
    timer.step(function(jnp.zeros(shape)))
  timer.stop()
  assert timer.take() == 1.0


def run(config, workdir, clock, monkeypatch, compiled=()):
  """Trains where a step takes 1 s, one in `compiled` 51, counting its FLOPs 10, an evaluation 100 and a
  checkpoint 1000."""
  step, evaluated, save = Program.step, loop.evaluate, Checkpoints.save

  def slow_step(program, number):
    clock(51.0 if number in compiled else 1.0)
    timing._compilations += number in compiled
    return step(program, number)

  def slow(function, seconds):
    def slowly(*arguments, **named):
      clock(seconds)
      return function(*arguments, **named)

    return slowly

  with monkeypatch.context() as patch:
    patch.setattr(Program, 'step', slow_step)
    patch.setattr(loop, 'evaluate', slow(evaluated, 100.0))
    patch.setattr(Checkpoints, 'save', slow(save, 1000.0))
    patch.setattr(Meter, 'step', slow(Meter.step, 10.0))
    result = train(config, str(workdir), progress=False)
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return result['metrics'], [line for line in lines if 'loss' in line]


def test_only_steps_are_timed(tiny_config, tmp_path, clock, monkeypatch):
  # Evaluations and checkpoints lie within the intervals of the log, and at their ends.
  config = tiny_config(train__log_every=5, train__eval_every=3, train__checkpoint_every=4)
  metrics, lines = run(config, tmp_path, clock, monkeypatch, compiled=(0, 6))
  assert metrics['train_step_ms'] == 1000.0
  tokens = config.data.batch * config.data.context
  assert [line['tokens_per_second'] for line in lines] == [tokens] * 3


def test_a_run_of_compiled_steps_alone_has_no_time(tiny_config, tmp_path, clock, monkeypatch):
  config = tiny_config(train__steps=1)
  metrics, lines = run(config, tmp_path, clock, monkeypatch, compiled=(0,))
  assert metrics['train_step_ms'] is None
  assert [line['step'] for line in lines] == [1] and 'tokens_per_second' not in lines[0]


def test_nothing_waits_for_the_device_between_two_lines(tiny_config, tmp_path, monkeypatch):
  config = tiny_config(train__log_every=6)
  train(config, str(tmp_path / 'first'), progress=False)  # compiles
  waits = []
  block = jax.block_until_ready
  monkeypatch.setattr(timing.jax, 'block_until_ready', lambda x: (waits.append('block'), block(x)))
  monkeypatch.setattr(loop._Loop, '_fetch', _noting(loop._Loop._fetch, waits))
  train(config, str(tmp_path / 'second'), progress=False)
  # At steps 6 and 12 for the log, and at step 12 for the evaluation and the checkpoint.
  assert waits.count('fetch') == 4
  assert waits.count('block') <= 1  # of the first step, if it compiled for this process


def _noting(function, waits):
  def noted(*arguments):
    waits.append('fetch')
    return function(*arguments)

  return noted
