"""Rotary positions."""

import math

import jax
import jax.numpy as jnp

from sparse_lm.layers.spec import LINEAR, LLAMA3, Spec


def rotate(spec: Spec, x_BxLxHxK: jax.Array, positions_BxL: jax.Array) -> jax.Array:
  """Rotates pairs `(x[k], x[k + R/2])` by `position * frequency[k]` (Su et al. 2021).

  R is `spec.rotated`, the number of dimensions of a head that are rotated. The others stay unchanged.

  Args:
    spec: the model's dimensions.
    x_BxLxHxK: queries or keys.
    positions_BxL: int32; `[1, L]` applies to all sequences.
  """
  frequency = _frequencies(spec)
  angle = positions_BxL[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  whole = spec.rotated == x_BxLxHxK.shape[-1]
  turned = x_BxLxHxK if whole else x_BxLxHxK[..., : spec.rotated]
  a, b = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxK.dtype)
  return turned if whole else jnp.concatenate([turned, x_BxLxHxK[..., spec.rotated :]], axis=-1)


def _frequencies(spec: Spec) -> jax.Array:
  """Returns the frequency of each pair in radians per token, float32 `[R / 2]`.

  Without scaling, the frequency of pair k is `rope_base^(-2k / R)`. With 'linear' all frequencies are
  divided by `rope_factor`. With 'llama3' only frequencies of at most `rope_low` turns in `rope_context`
  tokens are divided by it. Those of at least `rope_high` turns stay unchanged, and between the two limits
  the result is interpolated (meta-llama/llama-models, `apply_scaling`).
  """
  half = spec.rotated // 2
  frequency = spec.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if spec.rope_scaling == LINEAR:
    return frequency / spec.rope_factor
  if spec.rope_scaling != LLAMA3:
    return frequency
  turns = spec.rope_context * frequency / (2 * math.pi)  # in the context of the original model
  kept = jnp.clip((turns - spec.rope_low) / (spec.rope_high - spec.rope_low), 0, 1)
  return kept * frequency + (1 - kept) * frequency / spec.rope_factor
