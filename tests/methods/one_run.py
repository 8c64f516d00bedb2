"""Steps of a run one by one, and what is kept beside its weights: shared by tests of weight methods."""

import jax
import jax.numpy as jnp

from sparse_lm.core import tree


def states_of(run, state, batches, first=0):
  """The states on the host from `state`, which is before step `first`, to after a step for each batch."""
  states = [jax.device_get(state)]
  for step, tokens in enumerate(batches, start=first):
    # Steps donate their state, which may serve others.
    state, _ = run.program.step(step)(jax.tree.map(jnp.copy, state), tokens)
    states.append(jax.device_get(state))
  return states


def mirrors(state):
  """Weights, averages and both moments: the trees that are shaped like the parameters."""
  like = jax.tree.structure(state.trainable)

  def same(node):
    return jax.tree.structure(node) == like

  moments = [t for t in jax.tree.leaves(state.opt_state, is_leaf=same) if same(t)]
  assert len(moments) == 2
  return [tree.named(t['params']) for t in (state.trainable, state.ema, *moments)]
