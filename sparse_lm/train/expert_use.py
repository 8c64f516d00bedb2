"""Scores of the experts of a trained mixture on calibration text (REAP)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.stages import Wrapped

from sparse_lm.core.tree import Tree
from sparse_lm.kernels.grouped_matmul import block_rows
from sparse_lm.layers import dispatch
from sparse_lm.layers.experts import Experts
from sparse_lm.layers.mixture import MixtureOfExperts
from sparse_lm.layers.routing import Routing
from sparse_lm.model.lm import Layer
from sparse_lm.train.layerwise import Layers

Array = jax.Array


def contributions(layers: Layers, layer: int, params: Tree, stream: list[Array]) -> np.ndarray:
  """Returns, for each expert, the mean of `weight * norm(output)` over the tokens that visit it, `[E]`.

  This is the score of REAP (Lasby et al. 2025). It is 0 for an expert that no token visits.

  Args:
    layers: runs the layers of the model.
    layer: number of the layer.
    params: the layer's parameters.
    stream: the inputs of the layer for each batch, `[B, L, D]`.
  """
  module = layers.module(layer)
  variables, sums = layers.variables(module, layer, params), 0.0
  for x_BxLxD in stream:
    sums = sums + np.asarray(_compiled(module)(variables, x_BxLxD), np.float64)
  total_E, visits_E = sums
  return total_E / np.maximum(visits_E, 1)


@functools.lru_cache(maxsize=16)
def _compiled(module: Layer) -> Wrapped:
  return jax.jit(functools.partial(_sums, module))


def _sums(module: Layer, variables: Tree, x_BxLxD: Array) -> Array:
  """Returns `[2, E]`: for each expert, the sum of `weight * norm(output)` and the number of visits."""
  mixtures: list[tuple[MixtureOfExperts, Routing]] = []
  outputs: list[Array] = []

  def note(
    call: Callable[..., Tree],
    arguments: tuple,
    keywords: dict,
    context: nn.module.InterceptorContext,
  ) -> Tree:
    out = call(*arguments, **keywords)
    if isinstance(context.module, MixtureOfExperts) and context.method_name == 'route':
      mixtures.append((context.module, out))
    if isinstance(context.module, Experts) and context.method_name == '__call__':
      outputs.append(out)
    return out

  with nn.intercept_methods(note):
    module.apply(variables, x_BxLxD)
  ((mixture, routed),), (y_NxPxD,) = mixtures, outputs
  block = block_rows((mixture.count, x_BxLxD.shape[-1], mixture.units))
  plan = dispatch.assign_slots(routed.expert_TxJ, mixture.count, routed.capacity, block)
  norm_S = jnp.linalg.norm(y_NxPxD.astype(jnp.float32), axis=-1).ravel()
  # A dropped choice has slot S, and a choice without an expert has expert E: one more entry for each.
  norm_TxJ = jnp.append(norm_S, 0.0)[plan.slot_TxJ]
  each = jnp.stack([routed.weight_TxJ * norm_TxJ, plan.served_TxJ.astype(jnp.float32)])
  return jnp.zeros((2, mixture.count + 1)).at[:, routed.expert_TxJ].add(each)[:, :-1]
