"""Products with a matrix."""

import jax


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Computes `[..., in] @ [in, out]` as one two-dimensional product.

  XLA:CPU runs a product with two batch axes, and especially its gradients, at little more than half the
  speed.
  """
  flat = x.reshape(-1, x.shape[-1]) @ kernel
  return flat.reshape(*x.shape[:-1], kernel.shape[-1])
