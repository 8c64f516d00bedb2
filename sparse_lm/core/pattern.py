"""Patterns: which sets of weights may be kept. `(scores, density) -> mask`, exact count.

Kernels have 2-D trailing `[in, out]`; leading axes (experts) are batch, each slice with its own
count. Density may be traced, so that one executable serves a sweep of sparsities.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparse_lm.core.errors import unknown
from sparse_lm.core.select import topk_mask

Array = jax.Array


def kept(size: int, density: Array | float) -> Array:
  """`max(1, round(size * density))` as int32; exact where `size` is below 2**23."""
  return jnp.maximum(1, jnp.round(size * jnp.asarray(density, jnp.float32))).astype(jnp.int32)


def by_slice(f: Callable, array: Array, *rest: Array) -> Array:
  """Applies `f` to every trailing matrix of `array` (a vector counts as one matrix)."""
  for _ in range(max(array.ndim - 2, 0)):
    f = jax.vmap(f)
  return f(array, *rest)


def unstructured(scores: Array, density: Array | float) -> Array:
  """Keeps the largest scores of each matrix."""
  return by_slice(lambda s: topk_mask(s, kept(s.size, density)), scores)


PATTERNS: dict[str, Callable[[Array, Array], Array]] = {'unstructured': unstructured}


def pattern(name: str) -> Callable[[Array, Array], Array]:
  """The pattern of that name. Raises UserError, naming the valid ones."""
  if name not in PATTERNS:
    raise unknown('config.weight.pattern', name, PATTERNS)
  return PATTERNS[name]
