"""Values that modules sow in a forward pass: losses, statistics, gate activity and exits."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparse_lm.core import tree
from sparse_lm.core.paths import Place
from sparse_lm.core.tree import Tree
from sparse_lm.layers.after_step import UPDATES
from sparse_lm.layers.method import LayerMethod
from sparse_lm.plan import record

# Collections that are written in every forward pass and are not part of the state.
SOWN = ('losses', 'stats', 'gates', 'policy', 'exits', UPDATES)
CHUNKS = (
  8,
  32,
)  # numbers of consecutive tokens that a batched or speculative decoder runs together


class Exit(NamedTuple):
  """A residual stream of an early layer, from which the head is also trained to predict.

  Attributes:
    x_BxLxD: the residual stream, before the head's norm.
    weight: float32 weight of this exit's loss; the last layer's loss has weight 1.
  """

  x_BxLxD: jax.Array
  weight: jax.Array


def sow(module: nn.Module, collection: str, name: str, value: Tree) -> None:
  """Sows `value` at the module's path; a second call of the module replaces it.

  The collection decides the use: `losses` are added to the training loss, `stats` and `gates` are logged,
  `policy` is trained by rewards, and each `Exit` in `exits` gets a loss through the model's head. Nothing
  happens if the collection is not mutable in this call.
  """
  module.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def gate_activity(variables: Tree) -> dict[str, jax.Array]:
  """Returns, for each gate by its path, the fraction of its units that are open for each token.

  Args:
    variables: the collections that a call of the model returned; `gates` may be missing.
  """
  named = tree.named(variables.get('gates', {}))
  return {str(Place.parse(path).module): value for path, value in named.items()}


def observe_hidden_units(
  module: nn.Module, activation: LayerMethod | None, h_BxLxF: jax.Array, mode: str
) -> contextlib.AbstractContextManager[None]:
  """Sows statistics of an MLP's hidden units in evaluation; returns a context for their reader.

  - `active`: fraction of units that are not zero.
  - `dead`: fraction of units that are zero for every token of the batch.
  - `union_8`, `union_32`: fraction of units that are nonzero for at least one of 8 or 32 consecutive
    tokens. A decoder of several tokens must load their weights.

  These statistics change no cost, because nothing guarantees how many units are zero. But if the
  activation's traits have a gating, matmuls inside the context are charged at the fraction of units
  that it selects (see `sow_selected`).

  Args:
    module: the MLP.
    activation: its activation; `None` if the MLP gates the matmul itself.
    h_BxLxF: the hidden units.
    mode: 'train', 'eval' or 'decode'.
  """
  if mode != 'train':
    fires = h_BxLxF != 0
    sow(module, 'stats', 'active', jnp.mean(fires, dtype=jnp.float32))
    sow(module, 'stats', 'dead', jnp.mean(~jnp.any(fires, axis=(0, 1)), dtype=jnp.float32))
    for chunk in CHUNKS:
      sow(module, 'stats', f'union_{chunk}', _union(fires, chunk))
  if activation is None:
    return contextlib.nullcontext()
  return record.gated(activation.path, activation.traits.gating)


def sow_open(gate: nn.Module, open_BxL: jax.Array) -> None:
  """Sows the fraction of the gate's units that are open for each token; costs are charged by it."""
  sow(gate, 'gates', 'active', open_BxL.astype(jnp.float32))


def sow_selected(activation: nn.Module, mask_BxLxF: jax.Array, mode: str) -> None:
  """Sows the fraction of units that the activation selects for each token; not in training."""
  if mode != 'train':
    sow_open(activation, jnp.mean(mask_BxLxF, axis=-1, dtype=jnp.float32))


def _union(fires_BxLxF: jax.Array, chunk: int) -> jax.Array:
  b, length, f = fires_BxLxF.shape
  size = min(chunk, length)
  whole = fires_BxLxF[:, : length // size * size]
  return jnp.mean(jnp.any(whole.reshape(b, -1, size, f), axis=2), dtype=jnp.float32)
