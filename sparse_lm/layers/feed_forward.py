"""The plain two-matrix MLP, for modules that are one or hold one."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import project, selects
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.sow import hidden_units
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


def feed_forward(
  module: nn.Module,
  spec: Spec,
  activation: Callable[[], nn.Module],
  hidden: int,
  x_BxLxD: jax.Array,
  mode: str,
) -> jax.Array:
  """`down(activation(up(x)))`, `[B, L, D]` to `[B, L, D]`, with the parameters of `module`.

  Args:
    module: calls this in its compact method; its path names the units and the observations.
    activation: makes the activation slot's module.
    hidden: units between the two matrices.
  """
  act = activation()
  axes = {'up/kernel': -1, 'down/kernel': -2}
  record.units(module.path, 'neuron', hidden, axes, dynamic=selects(act))
  h_BxLxF = Linear(spec, hidden, name='up')(x_BxLxD)
  h_BxLxF = record.site(module, 'hidden', act(h_BxLxF, mode))
  with hidden_units(module, act, h_BxLxF, mode):
    down = Linear(spec, spec.width, role='out', name='down')
    return project(down, h_BxLxF, act, mode)


class FeedForward(nn.Module):
  """The MLP as a module of its own, of `hidden` units.

  Attributes:
    activation: makes the activation slot's module.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  hidden: int

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """`[B, L, D]` to `[B, L, D]`."""
    return feed_forward(self, self.spec, self.activation, self.hidden, x_BxLxD, mode)
