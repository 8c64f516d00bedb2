"""The experts' matrices, stacked, and what routing did to them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core import cost, groups
from sparse_lm.layers.init import INITS
from sparse_lm.layers.record import record
from sparse_lm.layers.spec import Spec


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
    self, x_NxPxD: jax.Array, expert_N: jax.Array | None, rows: int, mode: str
  ) -> jax.Array:
    """Blocks of rows through their experts: `[N, P, D]` to `[N, P, D]`.

    Args:
      expert_N: int32, the expert of each block; `None` where block i is expert i's.
      rows: (token, expert) pairs among the rows, for the ledger: empty slots are no work of theirs.
    """
    groups.note(self.path, 'neuron', self.experts * self.hidden, {'up': -1, 'down': -2})
    h_NxPxF = self._linear('up', 'in', self.hidden, x_NxPxD, expert_N, rows)
    h_NxPxF = self.activation()(h_NxPxF, mode)
    return self._linear('down', 'residual', self.spec.width, h_NxPxF, expert_N, rows)

  def _linear(self, name, role, features, x_NxPxI, expert_N, rows: int) -> jax.Array:
    spec, width = self.spec, x_NxPxI.shape[-1]
    one = INITS[spec.init](role, spec.layers)

    def each(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
      return jax.vmap(lambda k: one(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

    kernel = self.param(name, each, (self.experts, width, features), spec.stored)
    cost.note(self.path, 'linear', 2 * rows * width * features, kernel=name)
    y = jnp.einsum('npi,nif->npf', x_NxPxI, self._of_block(kernel, expert_N))
    if spec.bias:
      bias = self.param(
        f'{name}_bias', nn.initializers.zeros, (self.experts, features), spec.stored
      )
      y = y + self._of_block(bias, expert_N)[:, None]
    return y

  def _of_block(self, stacked: jax.Array, expert_N: jax.Array | None) -> jax.Array:
    stacked = stacked.astype(self.spec.compute)
    if expert_N is None:
      return stacked
    # A product with one-hot rows: its gradient is one too, where that of indexing is a scatter-add.
    chosen = jax.nn.one_hot(expert_N, self.experts, dtype=stacked.dtype)
    flat = chosen @ stacked.reshape(self.experts, -1)
    return flat.reshape(-1, *stacked.shape[1:])


def observe_routing(
  module: nn.Module, load_E: jax.Array, probability_TxE: jax.Array, dropped: jax.Array
) -> None:
  """Sows `load` (share of the pairs by expert, `[E]`), `max_violation` (largest load over the mean,
  less 1), `entropy` (of a token's routing in nats), `drop_rate` and `dead_experts` (fraction)."""
  share_E = load_E / jnp.maximum(jnp.sum(load_E), 1)
  entropy = -jnp.sum(probability_TxE * jnp.log(jnp.maximum(probability_TxE, 1e-20)), axis=-1)
  record(module, 'stats', 'load', share_E)
  record(module, 'stats', 'max_violation', jnp.max(share_E) * load_E.size - 1)
  record(module, 'stats', 'entropy', jnp.mean(entropy))
  record(module, 'stats', 'drop_rate', dropped.astype(jnp.float32))
  record(module, 'stats', 'dead_experts', jnp.mean(load_E == 0, dtype=jnp.float32))
