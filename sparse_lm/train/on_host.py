"""Functions that run once, compiled for the host's CPU."""

import functools
from collections.abc import Callable

import jax

from sparse_lm.core.tree import Tree


def on_host(function: Callable[..., Tree]) -> Callable[..., Tree]:
  """`function`, compiled for the host and run there; its outputs are then on the device.

  The initial state has random numbers and masks for every leaf of a model. A GPU's compiler took 59 s
  over those of 12 layers, where the host compiles and runs them and hands them over in 4.8 s (H100, 16
  cores). Where an argument is traced, or JAX has no CPU backend, this is `jax.jit(function)`.
  """
  compiled = jax.jit(function)

  @functools.wraps(compiled)
  def run(*arguments: Tree) -> Tree:
    device, host = jax.local_devices()[0], _host()
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    if traced or host is None or device == host:
      return compiled(*arguments)
    with jax.default_device(host):
      made = compiled(*jax.device_get(arguments))
    return jax.device_put(made, device)

  return run


def _host() -> jax.Device | None:
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS names other devices alone
    return None
