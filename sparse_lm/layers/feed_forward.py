"""The plain MLP with two matrices, as a function and as a module."""

from collections.abc import Callable

import jax
from flax import linen as nn

from sparse_lm.layers.active import project, selects
from sparse_lm.layers.linear import Linear
from sparse_lm.layers.sow import observe_hidden_units
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
  """Returns `down(activation(up(x)))`, `[B, L, D]` to `[B, L, D]`, with parameters of `module`.

  Args:
    module: the module whose compact method calls this function. Its path names the units and statistics.
    spec: the model's dimensions.
    activation: constructor of the activation slot's module.
    hidden: number of hidden units.
    x_BxLxD: inputs.
    mode: 'train', 'eval' or 'decode'.
  """
  act = activation()
  axes = {'up/kernel': -1, 'down/kernel': -2}
  record.units(module.path, 'neuron', hidden, axes, dynamic=selects(act))
  h_BxLxF = Linear(spec, hidden, name='up')(x_BxLxD)
  h_BxLxF = record.site(module, 'hidden', act(h_BxLxF, mode))
  with observe_hidden_units(module, act, h_BxLxF, mode):
    down = Linear(spec, spec.width, role='out', name='down')
    return project(down, h_BxLxF, act, mode)


class FeedForward(nn.Module):
  """The plain MLP as a module with `hidden` units.

  Attributes:
    activation: constructor of the activation slot's module.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  hidden: int

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Applies the MLP: `[B, L, D]` to `[B, L, D]`."""
    return feed_forward(self, self.spec, self.activation, self.hidden, x_BxLxD, mode)
