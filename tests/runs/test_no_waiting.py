"""Between two lines of the log the loop dispatches steps and waits for nothing."""

import itertools

import jax

from sparse_lm.runs.loop import train
from sparse_lm.train.step import Program


def test_the_host_fetches_nothing_between_log_lines(tiny_config, tmp_path, monkeypatch):
  events, compiled = [], Program.step

  def step(program, number):
    run = compiled(program, number)

    def noted(state, tokens, taught):
      assert isinstance(tokens, jax.Array)  # it was moved before the step asked for it
      events.append('step')
      return run(state, tokens, taught)

    return noted

  def note(name):
    original = getattr(jax, name)

    def noted(*arguments, **keywords):
      events.append(name)
      return original(*arguments, **keywords)

    monkeypatch.setattr(jax, name, noted)

  monkeypatch.setattr(Program, 'step', step)
  for name in ('device_get', 'block_until_ready'):
    note(name)
  config = tiny_config(weight__name='rigl', weight__sparsity=0.5, train__log_every=6)
  train(config, str(tmp_path / 'run'), progress=False)
  places = [place for place, event in enumerate(events) if event == 'step']
  assert len(places) == 12
  waits = [set(events[one + 1 : other]) for one, other in itertools.pairwise(places)]
  # A step that had to be compiled is waited for, so that its time is told from the others'.
  assert all(wait <= {'block_until_ready'} for wait in waits[:5] + waits[6:])
  assert sum(map(bool, waits[:5] + waits[6:])) <= 2 and 'device_get' in waits[5]
