"""Base classes of mixtures of experts; subclasses define only the router."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core.errors import require, unknown
from sparse_lm.core.ranges import ranged
from sparse_lm.kernels.grouped_matmul import block_rows
from sparse_lm.layers import dispatch, routing
from sparse_lm.layers.experts import Experts
from sparse_lm.layers.feed_forward import FeedForward
from sparse_lm.layers.method import LayerMethod
from sparse_lm.layers.routing import Routing
from sparse_lm.layers.sow import sow_open
from sparse_lm.layers.spec import Spec
from sparse_lm.plan import record


class MixtureOfExperts(LayerMethod):
  """A mixture of experts: the weighted sum of the outputs of the experts that `route` chooses.

  Attributes:
    activation: constructor of the activation slot's module.
    experts: number of experts.
    hidden: hidden units per expert; 0 means `config.model.hidden`.
    executor: 'sort', or 'einsum' for the slow reference.
    by_position: whether slots are assigned position by position instead of sequence by sequence, so that
      no token loses its slot to a later one.
    gated: whether the experts are gated MLPs (`Experts`).
  """

  spec: Spec
  activation: Callable[[], nn.Module]
  experts: int = ranged(8, '[1, 2^16]')
  hidden: int = ranged(0, '[0, 2^24]')
  executor: str = 'sort'
  by_position: ClassVar[bool] = False
  gated: ClassVar[bool] = False

  def check(self) -> None:
    """Raises a UserError if the executor is unknown."""
    if self.executor not in dispatch.EXECUTORS:
      raise unknown('config.mlp.executor', self.executor, dispatch.EXECUTORS)

  @property
  def count(self) -> int:
    """Number of experts that the router chooses among."""
    return self.experts

  @property
  def units(self) -> int:
    """Number of hidden units per expert."""
    return self.hidden or self.spec.hidden

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Chooses the experts of T tokens. It may sow losses and own variables."""
    raise NotImplementedError(type(self).__name__)

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Applies the mixture: `[B, L, D]` to `[B, L, D]`."""
    b, l, d = x_BxLxD.shape
    first, second = (l, b) if self.by_position else (b, l)
    x_TxD = (x_BxLxD.swapaxes(0, 1) if self.by_position else x_BxLxD).reshape(b * l, d)
    routed = self.route(x_TxD, mode)
    block = block_rows((self.count, d, self.units))
    plan = dispatch.assign_slots(routed.expert_TxJ, self.count, routed.capacity, block)
    routing.observe(self, routed, plan)
    visits_T = jnp.sum(plan.served_TxJ, axis=-1, dtype=jnp.float32)
    active = (visits_T / routed.visits).reshape(first, second)
    sow_open(self, active.T if self.by_position else active)
    y_TxD = self._run(x_TxD, routed, plan, mode, few=mode == 'decode' and l == 1)
    y = y_TxD.reshape(first, second, d)
    return y.swapaxes(0, 1) if self.by_position else y

  def _run(
    self, x_TxD: jax.Array, routed: Routing, plan: dispatch.SlotPlan, mode: str, few: bool
  ) -> jax.Array:
    shape = self.count, self.units, self.gated
    experts = Experts(self.spec, self.activation, *shape, name='experts')
    visits = x_TxD.shape[0] * routed.visits
    if few and routed.expert_TxJ.size <= self.count:
      run = lambda x_NxPxD, expert_N: experts(x_NxPxD, expert_N, visits, mode)  # noqa: E731
      return dispatch.run_choices(run, x_TxD, routed.expert_TxJ, routed.weight_TxJ)
    x_NxPxD = dispatch.dispatch(x_TxD, plan, self.executor)
    with record.gated(self.path, self.traits.gating):
      y_NxPxD = experts(x_NxPxD, plan.expert_N, visits, mode)
    return dispatch.combine(y_NxPxD, plan, routed.weight_TxJ, self.executor)


class SharedMixture(MixtureOfExperts):
  """A mixture with shared experts, which every token visits and whose output is added unweighted.

  The shared experts are computed as one MLP with the units of all of them, which gives the same sum. They
  run for every token, so their cost is not gated.

  Attributes:
    shared: number of shared experts, each as large as a routed one; 0 means none.
  """

  shared: int = ranged(0, '[0, 2^16]')

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array, mode: str) -> jax.Array:
    """Applies the routed and the shared experts: `[B, L, D]` to `[B, L, D]`."""
    routed_BxLxD = super().__call__(x_BxLxD, mode)
    if not self.shared:
      return routed_BxLxD
    hidden = self.shared * self.units
    return routed_BxLxD + FeedForward(self.spec, self.activation, hidden, name='shared')(
      x_BxLxD, mode
    )


def check_visits(k: int, experts: int) -> None:
  """Raises a UserError if a token would visit more experts than there are."""
  require(k <= experts, 'config.mlp.k', k, f'1 to the number of experts, {experts}')
