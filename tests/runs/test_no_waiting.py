"""Between two lines of the log the loop dispatches steps and waits for nothing."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.runs.loop import train
from sparse_lm.train.step import Program

# By which NumPy and Python read an array that is on the device.
READS = ('__array__', '__bool__', '__float__', '__int__', '__index__')


@pytest.mark.parametrize('taught', [False, True])
def test_the_host_fetches_nothing_between_log_lines(taught, tiny_config, tmp_path, monkeypatch):
  more = {}
  if taught:
    more['distill__teacher'] = str(tmp_path / 'teacher')
    train(tiny_config(train__steps=2), more['distill__teacher'], progress=False)
  events, compiled = [], Program.step

  def step(program, number):
    run = compiled(program, number)

    def noted(state, tokens, taught):
      assert isinstance(tokens, jax.Array)  # it was moved before the step asked for it
      events.append('step')
      return run(state, tokens, taught)

    return noted

  def note(owner, name):
    original = getattr(owner, name)

    def noted(*arguments, **keywords):
      events.append(name)
      return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, noted)

  monkeypatch.setattr(Program, 'step', step)
  for name in ('device_get', 'block_until_ready'):
    note(jax, name)
  for name in READS:
    note(type(jnp.zeros(())), name)
  config = tiny_config(weight__name='rigl', weight__sparsity=0.5, train__log_every=6, **more)
  train(config, str(tmp_path / 'run'), progress=False)
  places = [place for place, event in enumerate(events) if event == 'step']
  assert len(places) == 12
  waits = [set(events[one + 1 : other]) for one, other in itertools.pairwise(places)]
  # A step that had to be compiled is waited for, so that its time is told from the others'.
  assert all(wait <= {'block_until_ready'} for wait in waits[:5] + waits[6:])
  assert sum(map(bool, waits[:5] + waits[6:])) <= 2 and 'device_get' in waits[5]
