"""Adds float32 updates to bfloat16 weights, with stochastic rounding."""

import jax
import jax.numpy as jnp

from sparse_lm.core import tree
from sparse_lm.core.tree import Tree
from sparse_lm.weights.random_start import path_key


def in_float32(values: Tree) -> Tree:
  """Returns the leaves in float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), values)


def like(values: Tree, stored: Tree) -> Tree:
  """Returns the leaves in the dtypes of `stored`, rounded to the nearest."""
  return jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), values, stored)


def add_updates(trainable: Tree, updates: Tree, key: jax.Array) -> Tree:
  """Returns `trainable + updates` in the dtypes of `trainable`.

  Sums are rounded to bfloat16 at random, up or down, so that the expected value of the result is the sum
  (Gupta et al. 2015; Zamirai et al. 2020). Neighbouring bfloat16 numbers differ by 0.4 to 0.8 %, so
  rounding to the nearest would lose most updates of a small learning rate.

  Args:
    trainable: the trainable tree.
    updates: float32 updates.
    key: key of the random numbers, which only bfloat16 leaves use.
  """

  def add(path: str, leaf: jax.Array, update: jax.Array) -> jax.Array:
    total = leaf + update
    if leaf.dtype != jnp.bfloat16:
      return total.astype(leaf.dtype)
    return _stochastic(total.astype(jnp.float32), path_key(key, f'rounding/{path}'))

  return tree.map_named(add, trainable, updates)


def _stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 to bfloat16, up or down at random, with the input as the expected value."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
