"""Declarations of modules are collected only in a recording."""

import jax.numpy as jnp
import pytest
from flax import linen as nn

from sparse_lm.core.groups import Group, Member
from sparse_lm.plan import executed, record
from sparse_lm.plan.cost import Gate, Gating, Matmul
from sparse_lm.plan.record import Site


class Point(nn.Module):
  """One site."""

  def __call__(self, x):
    """The activations there."""
    return record.site(self, 'point', x, kernel='up/kernel')


def declare():
  axes = {'up/kernel': -1, 'down': -2}
  record.units(('block_0', 'mlp'), 'neuron', 3, axes)
  record.packable(('a',), 'kernel', 'bias')
  record.fused(('a',), 'q_k', ('q', 'k'))
  Point(name='here').apply({}, jnp.ones((2, 3)))


def test_declarations_are_collected_by_the_innermost_recording():
  declare()  # nobody listens
  with record.recording() as outer:
    declare()
    with record.recording() as inner:
      record.units(('other',), 'head', 2, {'q': -1})
      record.packable(('b',), 'kernel')
    declare()  # a second trace of the same
  assert set(inner.units) == {'other/head'} and list(inner.packable) == ['b/kernel']
  members = (Member('block_0/mlp/up/kernel', -1), Member('block_0/mlp/down', -2))
  assert outer.units == {'block_0/mlp/neuron': Group('neuron', 'block_0/mlp', 3, members)}
  assert list(outer.packable) == ['a/kernel', 'a/bias'] and outer.fused == {'a/q_k': ('a/q', 'a/k')}
  assert outer.sites == {'point': Site('point', (2, 3), jnp.dtype('float32'), 'up/kernel')}


def test_arrays_are_marked_in_a_recording_alone():
  y, path = jnp.ones(3), ('a',)
  assert record.matmul(y, path, 'linear', 5) is y and record.uncharged(y, 'why', 5) is y
  found = executed.trace(lambda y: record.matmul(y, path, 'linear', 7, kernel='kernel'), y)
  assert found.ledger == {'a/linear': Matmul('linear', 7.0, 'a/kernel')} and found.flops == 0


def test_matmuls_belong_to_the_gates_that_are_open_where_they_are_noted():
  def run(y):
    with pytest.raises(ValueError, match='inside'), record.gated(('gate',), Gating(planned=0.5)):
      raise ValueError('inside')
    # A gate that an exception left is closed again.
    return record.matmul(y, ('none',), 'linear', 1)

  def returning(y):
    with record.gated(('outer',), Gating(planned=0.5)):
      with record.gated(('inner',), Gating(controlled=True, skips=False)):
        y = record.matmul(y, ('both',), 'linear', 1)
      y = record.matmul(y, ('one',), 'linear', 1)
    return y

  gates = Gate(path='outer', planned=0.5), Gate(path='inner', controlled=True, skips=False)
  found = {name: m.gates for name, m in executed.trace(returning, jnp.ones(2)).ledger.items()}
  assert found == {'both/linear': gates, 'one/linear': gates[:1]}
  assert executed.trace(run, jnp.ones(2)).ledger['none/linear'].gates == ()
