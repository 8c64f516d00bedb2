"""The initial state is computed on the host and is the same for every device."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL

from sparse_lm.runs.build import build
from sparse_lm.train.on_host import OnHost


def test_the_host_computes_the_state_and_the_device_gets_it(monkeypatch):
  (host, *_), seen, put = jax.local_devices(backend='cpu'), [], []

  def function(x, y):
    seen.append(jax.config.jax_default_device)
    return {'sum': x + y}

  monkeypatch.setattr(
    jax, 'local_devices', lambda backend=None: ['gpu'] if backend is None else [host]
  )
  monkeypatch.setattr(jax, 'device_put', lambda made, device: put.append(device) or made)
  run = OnHost(function)
  assert float(run(2, jnp.float32(3))['sum']) == 5 and float(run(4, jnp.float32(3))['sum']) == 7
  assert seen == [host] and put == ['gpu', 'gpu']  # traced once


def test_without_a_host_and_where_traced_it_is_compiled_as_usual(monkeypatch):
  run = OnHost(lambda x: x + 1)
  np.testing.assert_array_equal(jax.vmap(run)(jnp.arange(3)), [1, 2, 3])
  local = jax.local_devices

  def alone(backend=None):
    if backend == 'cpu':
      raise RuntimeError('Unknown backend cpu')
    return local()

  monkeypatch.setattr(jax, 'local_devices', alone)
  assert float(run(1)) == 2


BEGUN = """
import json
import sys
import jax
import numpy as np
from sparse_lm.runs import configs
from sparse_lm.runs.build import build
local, events = jax.local_devices, []
jax.local_devices = lambda backend=None: local()[:1] if backend else local()[1:]
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
program, target = build(configs.load(*json.loads(sys.argv[1])), 11)
state = program.begin(0, target, (4, 17))
want = jax.jit(program.init.compiled)(0, target).replace(key=None)
jax.tree.map(np.testing.assert_array_equal, state.replace(key=None), want)
assert {leaf.device for leaf in jax.tree.leaves(state)} == {local()[1]}
program.finalize(state)
events.clear()
for step in range(2):
  tokens = np.full((4, 17), step, np.int32)
  state, metrics = program.step(step)(state, jax.device_put(tokens) if step else tokens, None)
assert not [event for event in events if 'compile' in event], events
"""


@pytest.mark.slow
def test_steps_are_compiled_beside_the_initial_state():
  # The second of two CPUs stands for a device that is not the host.
  asked = 'configs/tiny.py', {**SMALL, 'weight.name': 'set', 'weight.sparsity': 0.5}
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  command = [sys.executable, '-c', BEGUN, json.dumps(asked)]
  subprocess.run(command, check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize('method', ['none', 'static'])
def test_gpu_runs_start_from_the_weights_and_masks_of_cpu_runs(method, tiny_config, on_nvidia):
  def state():
    sparsity = 0.5 if method == 'static' else 0.0
    config = tiny_config(weight__name=method, weight__sparsity=sparsity, model__precision='auto')
    program, target = build(config, 11)
    return program.model, program.init(0, target).replace(key=None)

  here, want = state()
  on_nvidia(9, 0)
  there, got = state()
  assert (here.spec.precision, there.spec.precision) == ('float32', 'bfloat16')
  jax.tree.map(np.testing.assert_array_equal, got, want)
