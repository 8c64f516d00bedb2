"""A mixture of experts with a ReLU router (ReMoE)."""

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

DISPLAY_NAME = 'ReMoE'

# Bounds of the price: a price of zero could not rise by multiplication, and infinity times zero is NaN.
LEAST, MOST = 1e-12, 1e6


@dataclasses.dataclass(frozen=True)
class _TowardVisits:
  """Multiplies the price by `factor` if tokens visit more than `k` experts on average, else divides it.

  In the words of the paper: the price rises while the sparsity of the gates is below its target, 1 - k/E.
  """

  k: int
  factor: float

  def __call__(self, price: jax.Array, counts: tuple[jax.Array, jax.Array]) -> jax.Array:
    visits, tokens = counts
    direction = jnp.sign(visits - self.k * tokens)
    return jnp.clip(price * self.factor**direction, LEAST, MOST)


class MoEReLU(SharedMixture):
  """Each expert has a gate, the ReLU of a linear router; tokens visit the experts with positive gates.

  There is no top-k, so a token may visit any number of experts, and the router is differentiable.
  Training adds `price * E * sum_e mean(gate_e) * f_e / k` to the loss. f_e is the fraction of the
  microbatch's tokens that visit expert e; no gradient flows through it. The price is state. It starts so
  low that it has no effect. After each optimizer step it is multiplied by `factor` if fewer than 1 - k/E
  of all gates of all layers were closed, and divided by `factor` if more were. All gates of a layer may
  close for all tokens. Then the layer adds only the output of its shared experts, and its router gets no
  gradient any more. The statistic `closed` is 1 for such a layer.

  Training computes every expert for every token and is charged for all of them. Evaluation is charged for
  the measured fraction of open gates. Decoding one sequence reads only the experts with open gates.

  Differs from the paper: the penalty is the sum over the layers instead of the mean (the price makes up
  for the factor), and the price stays between 1e-12 and 1e6.

  Attributes:
    activation: creates the module of the activation slot.
    experts: number of experts, E.
    k: experts that a token is to visit on average.
    shared: number of experts that every token visits in addition.
    hidden: hidden units of an expert; 0 = `config.model.hidden`.
    start: the price at step 0.
    factor: factor by which the price rises or falls after a step.
    executor: 'sort', or 'einsum', which is a slow reference.
  """

  k: int = ranged(1, '[1, 2^16]')
  start: float = ranged(1e-8, '[1e-12, 1e6]')
  factor: float = ranged(1.2, '[1, inf)')

  @property
  def traits(self) -> Traits:
    """The traits of the method."""
    return Traits(
      paper='ReMoE (Wang et al. 2024)',
      saves='the experts whose gate is zero; nothing at the start of training',
      twin='dense',
      gating=Gating(planned=self.k / self.experts),
    )

  def check(self) -> None:
    """Raises UserError if the fields do not fit each other."""
    super().check()
    check_visits(self.k, self.experts)

  def route(self, x_TxD: jax.Array, mode: str) -> Routing:
    """Gives each token one choice for each expert, which is valid if the gate is open."""
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
    # Each expert has a slot for every token, so no token is dropped and no matrix is copied.
    slots = x_TxD.shape[0]
    return Routing(choice_TxE, gate_TxE, gate_TxE / total_Tx1, float(self.experts), slots)
