"""The experts' matrices, stacked, and what routing did to them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.layers.active import selects
from sparse_lm.layers.init import INITS
from sparse_lm.layers.sow import sow
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class Experts(nn.Module):
  """`experts` plain MLPs of `hidden` units with kernels `[E, D, F]` and `[E, F, D]`.

  Attributes:
    activation: makes the activation slot's module.
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  experts: int
  hidden: int

  @nn.compact
  def __call__(
    self, x_NxPxD: jax.Array, expert_N: jax.Array | None, rows: float, mode: str
  ) -> jax.Array:
    """Blocks of rows through their experts: `[N, P, D]` to `[N, P, D]`.

    Args:
      expert_N: int32, the expert of each block; `None` where block i is expert i's. Decoding with one
        row to the block reads the experts named and no other; `experts` names none.
      rows: (token, expert) pairs among the rows, for the ledger: empty slots are no work of theirs.
    """
    activation = self.activation()
    run = functools.partial(self._run, activation, rows=rows, mode=mode)
    axes, dynamic = {'up': -1, 'down': -2}, selects(activation)
    record.units(self.path, 'neuron', self.experts * self.hidden, axes, dynamic)
    if not self.has_variable('packed', 'kept'):
      return run(x_NxPxD, expert_N)
    kept_R = self.get_variable('packed', 'kept')  # the others add nothing and were removed
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
    h_NxPxF = self._linear('up', 'in', self.hidden, x_NxPxD, expert_N, rows, mode)
    h_NxPxF = activation(h_NxPxF, mode)
    return self._linear('down', 'out', self.spec.width, h_NxPxF, expert_N, rows, mode)

  def _linear(self, name, role, features, x_NxPxI, expert_N, rows: float, mode: str) -> jax.Array:
    spec, width = self.spec, x_NxPxI.shape[-1]
    one = INITS[spec.init](role, spec.layers)

    def each(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
      return jax.vmap(lambda k: one(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

    if self.has_variable('packed', name):
      stored = self.get_variable('packed', name)
      left = jax.eval_shape(stored.kernel).shape[0]
      y = _through(stored.of_expert, left, x_NxPxI, expert_N)
    else:
      record.packable(self.path, name, f'{name}_bias')
      kernel = self.param(name, each, (self.experts, width, features), spec.stored)
      if mode == 'decode' and expert_N is not None and x_NxPxI.shape[1] == 1:
        of_expert = lambda x, expert: x @ kernel[expert].astype(spec.compute)  # noqa: E731
        y = _through(of_expert, self.experts, x_NxPxI, expert_N)
      else:
        kernel_NxIxF = self._of_block(kernel.astype(spec.compute), expert_N)
        y = jnp.einsum('npi,nif->npf', x_NxPxI, kernel_NxIxF)
      row = 2 * width * features
      y = record.matmul(y, self.path, 'linear', row * rows, kernel=name)
      slots = x_NxPxI.shape[0] * x_NxPxI.shape[1]
      y = record.uncharged(y, 'slots of experts, less the visits charged', row * (slots - rows))
    y = y.astype(spec.compute)
    if spec.bias:
      if self.has_variable('packed', f'{name}_bias'):
        bias = self.get_variable('packed', f'{name}_bias')
      else:
        shape = (self.experts, features)
        bias = self.param(f'{name}_bias', nn.initializers.zeros, shape, spec.stored)
        bias = record.matmul(bias, self.path, 'bias', 0, kernel=f'{name}_bias')
      y = y + self._of_block(bias.astype(spec.compute), expert_N)[:, None]
    return y

  def _of_block(self, stacked: jax.Array, expert_N: jax.Array | None) -> jax.Array:
    if expert_N is None:
      return stacked
    # A product with one-hot rows: its gradient is one too, where that of indexing is a scatter-add.
    chosen = jax.nn.one_hot(expert_N, len(stacked), dtype=stacked.dtype)
    flat = chosen @ stacked.reshape(len(stacked), -1)
    flops = 2 * expert_N.size * stacked.size
    flat = record.uncharged(flat, "experts' parameters copied to the blocks of their tokens", flops)
    return flat.reshape(-1, *stacked.shape[1:])


def _through(
  of_expert: Callable[[jax.Array, int], jax.Array],
  experts: int,
  x_NxPxI: jax.Array,
  expert_N: jax.Array | None,
) -> jax.Array:
  """Each block of rows through its expert, `of_expert(x, expert)`, and zeros for one that there is not.

  One block after the other, as suits a CPU: no weight is copied. `expert_N` as in `Experts`.
  """
  if expert_N is None:
    return jnp.stack([of_expert(x_PxI, expert) for expert, x_PxI in enumerate(x_NxPxI)])
  branches = [functools.partial(of_expert, expert=expert) for expert in range(experts)]
  shape = jax.eval_shape(branches[0], x_NxPxI[0])
  branches += [lambda x_PxI: jnp.zeros(shape.shape, shape.dtype)]
  run = lambda block: jax.lax.switch(block[0], branches, block[1])  # noqa: E731
  if x_NxPxI.shape[1] == 1:  # of one token, few: a loop would cost more than what it repeats
    return jnp.stack([run(block) for block in zip(expert_N, x_NxPxI)])
  return jax.lax.map(run, (expert_N, x_NxPxI))


def observe_routing(
  module: nn.Module, load_E: jax.Array, probability_TxE: jax.Array, dropped: jax.Array
) -> None:
  """Sows `load` (share of the pairs by expert, `[E]`), `max_violation` (largest load over the mean,
  less 1), `entropy` (of a token's routing in nats), `drop_rate` and `dead_experts` (fraction)."""
  share_E = load_E / jnp.maximum(jnp.sum(load_E), 1)
  entropy = -jnp.sum(probability_TxE * jnp.log(jnp.maximum(probability_TxE, 1e-20)), axis=-1)
  sow(module, 'stats', 'load', share_E)
  sow(module, 'stats', 'max_violation', jnp.max(share_E) * load_E.size - 1)
  sow(module, 'stats', 'entropy', jnp.mean(entropy))
  sow(module, 'stats', 'drop_rate', dropped.astype(jnp.float32))
  sow(module, 'stats', 'dead_experts', jnp.mean(load_E == 0, dtype=jnp.float32))
