"""The experts of a mixture of experts: MLPs with stacked matrices."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.kernels.grouped_matmul import (
  copied_flops,
  gather_groups,
  grouped_matmul,
  one_by_one,
  selection_flops,
)
from sparse_lm.layers.active import selects
from sparse_lm.layers.init import INITS
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record

COPIES = 'copies of expert parameters for blocks of tokens'


class Experts(nn.Module):
  """`experts` MLPs of `hidden` units with kernels `[E, D, F]` (up and gate) and `[E, F, D]` (down).

  Attributes:
    activation: constructor of the activation slot's module.
    gated: whether an expert is a gated MLP, `down(activation(gate(x)) * up(x))`.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  experts: int
  hidden: int
  gated: bool = False

  @nn.compact
  def __call__(
    self, x_NxPxD: jax.Array, expert_N: jax.Array | None, rows: float, mode: str
  ) -> jax.Array:
    """Applies experts to blocks of rows: `[N, P, D]` to `[N, P, D]`.

    Args:
      x_NxPxD: blocks of rows.
      expert_N: int32, the expert of each block; `None` if block i belongs to expert i. The value
        `experts` means no expert. With one row per block (decoding), only the named experts are read.
      rows: number of (token, expert) pairs that the ledger charges; empty slots are not charged.
      mode: 'train', 'eval' or 'decode'.
    """
    activation = self.activation()
    run = functools.partial(self._run, activation, rows=rows, mode=mode)
    axes, dynamic = {'up': -1, 'down': -2}, selects(activation)
    axes |= {'gate': -1} if self.gated else {}
    record.units(self.path, 'neuron', self.experts * self.hidden, axes, dynamic)
    if not self.has_variable('packed', 'kept'):
      return run(x_NxPxD, expert_N)
    kept_R = self.get_variable('packed', 'kept')  # the other experts had no weights left
    place_E = (
      jnp.full(self.experts + 1, kept_R.size, jnp.int32).at[kept_R].set(jnp.arange(kept_R.size))
    )
    if expert_N is not None:
      return run(x_NxPxD, place_E[expert_N])
    y_RxPxD = run(x_NxPxD[kept_R], None)
    return jnp.pad(y_RxPxD, ((0, 1), (0, 0), (0, 0)))[place_E[:-1]]

  def _run(
    self,
    activation: nn.Module,
    x_NxPxD: jax.Array,
    expert_N: jax.Array | None,
    rows: float,
    mode: str,
  ) -> jax.Array:
    up_NxPxF = self._linear('up', 'in', self.hidden, x_NxPxD, expert_N, rows)
    if self.gated:
      gate_NxPxF = self._linear('gate', 'in', self.hidden, x_NxPxD, expert_N, rows)
      h_NxPxF = activation(gate_NxPxF, mode) * up_NxPxF
    else:
      h_NxPxF = activation(up_NxPxF, mode)
    h_NxPxF = record.site(self, 'hidden', h_NxPxF)
    return self._linear('down', 'out', self.spec.width, h_NxPxF, expert_N, rows)

  def _linear(
    self,
    name: str,
    role: str,
    features: int,
    x_NxPxI: jax.Array,
    expert_N: jax.Array | None,
    rows: float,
  ) -> jax.Array:
    spec, width = self.spec, x_NxPxI.shape[-1]
    x_NxPxI = record.site(self, f'{name}/input', x_NxPxI, kernel=name)
    one = INITS[spec.init](role, spec.layers)

    def each(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
      return jax.vmap(lambda k: one(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

    if self.has_variable('packed', name):
      stored = self.get_variable('packed', name)
      left = jax.eval_shape(stored.kernel).shape[0]
      y = one_by_one(stored.of_expert, left, x_NxPxI, expert_N)
    else:
      record.packable(self.path, name, f'{name}_bias')
      kernel = self.param(name, each, (self.experts, width, features), spec.stored)
      y = grouped_matmul(x_NxPxI, kernel, expert_N)
      row, slots = 2 * width * features, x_NxPxI.shape[0] * x_NxPxI.shape[1]
      y = record.matmul(y, self.path, 'linear', row * rows, kernel=name)
      y = record.uncharged(y, 'slots of experts beyond the charged visits', row * (slots - rows))
      y = record.uncharged(y, COPIES, copied_flops(x_NxPxI, kernel, expert_N))
    y = y.astype(spec.compute)
    if spec.has_bias(name):
      if self.has_variable('packed', f'{name}_bias'):
        bias = self.get_variable('packed', f'{name}_bias')
      else:
        shape = (self.experts, features)
        bias = self.param(f'{name}_bias', nn.initializers.zeros, shape, spec.stored)
        bias = record.matmul(bias, self.path, 'bias', 0, kernel=f'{name}_bias')
      bias_NxF = gather_groups(bias.astype(spec.compute), expert_N)
      y = y + record.uncharged(bias_NxF, COPIES, selection_flops(bias, expert_N))[:, None]
    return record.site(self, f'{name}/output', y)
