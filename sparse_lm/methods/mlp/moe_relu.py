"""Mixture of experts in which a token visits as many as its router leaves above zero."""

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.core.ranges import ranged
from sparse_lm.layers.after_step import after_step
from sparse_lm.layers.method import Traits
from sparse_lm.layers.mixture import SharedMixture, check_visits
from sparse_lm.layers.router import Router
from sparse_lm.layers.routing import Routing
from sparse_lm.layers.sow import sow
from sparse_lm.plan.cost import Gating

# The price stays between these: from zero it could not rise, and infinity times zero is no number.
LEAST, MOST = 1e-12, 1e6


@dataclasses.dataclass(frozen=True)
class _TowardVisits:
  """Multiplies a price by `factor` where tokens visit more than `k` experts on average, else divides it.

  As the method has it: where the sparsity of the gates is below its target, 1 - k/E.
  """

  k: int
  factor: float

  def __call__(self, price: jax.Array, counts: tuple[jax.Array, jax.Array]) -> jax.Array:
    visits, tokens = counts
    direction = jnp.sign(visits - self.k * tokens)
    return jnp.clip(price * self.factor**direction, LEAST, MOST)


class MoEReLU(SharedMixture):
  """A gate for each expert, the ReLU of a linear router: an expert runs where its gate is not zero.

  There is no top-k: a token visits none to all of the experts, and the router is differentiable. Training
  adds `price * E * sum_e mean(gate_e) * f_e / k` to the loss, f_e being the fraction of the microbatch's
  tokens that visit expert e, through which no gradient flows. The price is state: it starts so small that
  nothing is felt of it, and after each optimizer step it is multiplied by `factor` where less than
  1 - k/E of all gates of all layers were closed, and divided where more were. So a layer may close as a
  whole, and adds only its shared experts then; its router gets no gradient any more. The statistic
  `closed` reports it.

  Training computes every expert for every token, and is charged for it; evaluation is charged for the
  measured fraction of open gates, and decoding one sequence reads no other expert.

  Differs from the paper: the penalty is the sum over the layers, not the mean, which the price absorbs,
  and the price stays between 1e-12 and 1e6.

  Attributes:
    activation: makes the activation slot's module.
    experts: how many there are, E.
    k: experts that a token is to visit on average.
    shared: experts that every token visits besides.
    hidden: units of an expert, 0 = `config.model.hidden`.
    start: the price at step 0.
    factor: that the price is multiplied with or divided by after a step.
    executor: 'sort', or 'einsum', the slow reference.
  """

  k: int = ranged(1, '[1, 2^16]')
  start: float = ranged(1e-8, '[1e-12, 1e6]')
  factor: float = ranged(1.2, '[1, inf)')

  @property
  def traits(self) -> Traits:
    """What the method declares."""
    return Traits(
      paper='ReMoE (Wang et al. 2024)',
      saves='the experts whose gate is zero; nothing at the start of training',
      twin='dense',
      gating=Gating(planned=self.k / self.experts),
    )

  def check(self) -> None:
    """Raises UserError where fields do not fit each other."""
    super().check()
    check_visits(self.k, self.experts)

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Every token has a choice for each expert; it counts where the expert's gate is open."""
    gate_TxE = jax.nn.relu(Router(self.spec, self.experts, name='router')(x_TxD))
    open_TxE = gate_TxE > 0
    begin = lambda: jnp.full((), self.start, jnp.float32)  # noqa: E731
    price = self.variable('router', 'price', begin)
    if mode == 'train':
      share_E = jnp.mean(open_TxE, axis=0, dtype=jnp.float32)
      penalty = self.experts / self.k * jnp.sum(jnp.mean(gate_TxE, axis=0) * share_E)
      sow(self, 'losses', 'gates', price.value * penalty)
      sow(self, 'stats', 'price', price.value)
      counts = jnp.sum(open_TxE, dtype=jnp.int32), jnp.int32(x_TxD.shape[0])
      rule = _TowardVisits(self.k, self.factor)
      after_step(self, 'router', 'price', counts, rule, pooled=True)
    choice_TxE = jnp.where(open_TxE, jnp.arange(self.experts), self.experts)
    total_Tx1 = jnp.maximum(jnp.sum(gate_TxE, axis=-1, keepdims=True), 1e-20)
    # An expert has a slot for every token, so none is dropped and no matrix is copied.
    slots = x_TxD.shape[0]
    return Routing(choice_TxE, gate_TxE, gate_TxE / total_Tx1, float(self.experts), slots)
