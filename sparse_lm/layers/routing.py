"""The decisions of a router, and their statistics."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sparse_lm.layers.dispatch import SlotPlan
from sparse_lm.layers.sow import sow


@struct.dataclass
class Routing:
  """The experts that a router chooses for T tokens, with J choices per token.

  Attributes:
    expert_TxJ: int32, the expert of each choice; the number of experts, E, means no expert.
    weight_TxJ: float32, the factor of each chosen expert's output.
    probability_TxE: float32, the router's probabilities; used only for statistics.
    visits: average number of experts that a token visits; the ledger charges this number.
    capacity: number of slots per expert; further choices are dropped. `None` means no limit.
  """

  expert_TxJ: jax.Array
  weight_TxJ: jax.Array
  probability_TxE: jax.Array
  visits: float = struct.field(pytree_node=False)
  capacity: int | None = struct.field(pytree_node=False, default=None)


def observe(module: nn.Module, routing: Routing, plan: SlotPlan) -> None:
  """Sows statistics of a routing in the `stats` collection of the module.

  - `load`: fraction of all choices that each expert gets, `[E]`.
  - `max_violation`: largest load divided by the mean load, minus 1; 0 if no token chose an expert.
  - `closed`: 1 if no token of the batch chose an expert, so that no expert of the layer runs; else 0.
  - `entropy`: mean entropy of the tokens' probabilities, in nats.
  - `drop_rate`: fraction of choices that were dropped.
  - `dead_experts`: fraction of experts that no token chose.
  """
  asked = jnp.sum(plan.load_E)
  share_E = plan.load_E / jnp.maximum(asked, 1)
  probability_TxE = routing.probability_TxE
  entropy = -jnp.sum(probability_TxE * jnp.log(jnp.maximum(probability_TxE, 1e-20)), axis=-1)
  sow(module, 'stats', 'load', share_E)
  violation = jnp.max(share_E) * plan.load_E.size - 1
  sow(module, 'stats', 'max_violation', jnp.where(asked > 0, violation, 0.0))
  sow(module, 'stats', 'closed', (asked == 0).astype(jnp.float32))
  sow(module, 'stats', 'entropy', jnp.mean(entropy))
  sow(module, 'stats', 'drop_rate', plan.dropped.astype(jnp.float32))
  sow(module, 'stats', 'dead_experts', jnp.mean(plan.load_E == 0, dtype=jnp.float32))
