"""What a router decides for experts, and what is observed of it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sparse_lm.layers.dispatch import Plan
from sparse_lm.layers.sow import sow


@struct.dataclass
class Routing:
  """Which experts T tokens ask for in J choices each, and how what they give is weighted.

  Attributes:
    expert_TxJ: int32, the expert of each choice; E, the number of experts, stands for none.
    weight_TxJ: float32, what the expert's output is multiplied with.
    probability_TxE: float32, how much the router likes each expert; it is observed only.
    visits: experts that a token visits on average, which is what the ledger charges.
    capacity: slots of each expert, beyond which choices are dropped; `None` = as many as it needs.
  """

  expert_TxJ: jax.Array
  weight_TxJ: jax.Array
  probability_TxE: jax.Array
  visits: float = struct.field(pytree_node=False)
  capacity: int | None = struct.field(pytree_node=False, default=None)


def observe(module: nn.Module, routing: Routing, plan: Plan) -> None:
  """Sows what became of a routing as `stats` of the module.

  `load` is the share of all choices by expert, `[E]`; `max_violation` the largest load over the mean,
  less 1, and 0 where no token asked for any expert: such a layer is `closed`, which is 1 then and else 0.
  `entropy` is that of a token's probabilities in nats; `drop_rate` and `dead_experts` are fractions.
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
