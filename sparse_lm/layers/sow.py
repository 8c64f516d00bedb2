"""What a method says about its forward pass, besides its output."""

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

# Written anew in every forward pass, never state.
SOWN = ('losses', 'stats', 'gates', 'policy', 'exits', UPDATES)
CHUNKS = (8, 32)  # consecutive tokens that a batched or speculative decoder runs together


class Exit(NamedTuple):
  """A residual stream from which the model's head is trained to predict too.

  Attributes:
    x_BxLxD: before the head's norm.
    weight: of its loss, float32, where that of the last layer has 1.
  """

  x_BxLxD: jax.Array
  weight: jax.Array


def sow(module: nn.Module, collection: str, name: str, value: Tree) -> None:
  """Sows `value` at the module's path; a second call of the module replaces it.

  `losses` are added to the training loss as they are, `stats` and `gates` are logged, `policy` is
  trained by its reward, and `exits` (each an `Exit`) by the loss of the model's head on them. Does
  nothing where the collection is not asked for.
  """
  module.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


def activity_of(variables: Tree) -> dict[str, jax.Array]:
  """The fraction of its units that every gate opened for each token, by the gate's path.

  Args:
    variables: what a call of the model sowed, with or without `gates`.
  """
  named = tree.named(variables.get('gates', {}))
  return {str(Place.parse(path).module): value for path, value in named.items()}


def hidden_units(
  module: nn.Module, activation: LayerMethod | None, h_BxLxF: jax.Array, mode: str
) -> contextlib.AbstractContextManager[None]:
  """Observes an MLP's hidden units in evaluation; inside the context it is noted what reads them.

  Sows `active`, the fraction of units that are not zero; `dead`, of units that fire for no token of
  the batch; `union_8` and `union_32`, of units that fire for one of that many consecutive tokens at
  least, which is what they must all load together. These are observations, and no cost follows from
  them, because nothing bounds how many units happen to be zero. An activation whose traits have a gating
  gates what reads them, at the fraction of units that it selects (see `selected`).
  """
  if mode != 'train':
    fires = h_BxLxF != 0
    sow(module, 'stats', 'active', jnp.mean(fires, dtype=jnp.float32))
    sow(module, 'stats', 'dead', 1 - jnp.mean(jnp.any(fires, axis=(0, 1)), dtype=jnp.float32))
    for chunk in CHUNKS:
      sow(module, 'stats', f'union_{chunk}', _union(fires, chunk))
  if activation is None:
    return contextlib.nullcontext()
  return record.gated(activation.path, activation.traits.gating)


def selected(activation: nn.Module, mask_BxLxF: jax.Array, mode: str) -> None:
  """Sows, in evaluation, the fraction of units that the activation selects for each token."""
  if mode != 'train':
    sow(activation, 'gates', 'active', jnp.mean(mask_BxLxF, axis=-1, dtype=jnp.float32))


def _union(fires_BxLxF: jax.Array, chunk: int) -> jax.Array:
  b, length, f = fires_BxLxF.shape
  size = min(chunk, length)
  whole = fires_BxLxF[:, : length // size * size]
  return jnp.mean(jnp.any(whole.reshape(b, -1, size, f), axis=2), dtype=jnp.float32)
